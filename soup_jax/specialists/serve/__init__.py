"""The soup as a service: specialists made and asked over HTTP."""
