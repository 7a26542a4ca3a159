"""Text to a prepared corpus, in stages that survive a kill."""
