"""The method: bank, router, merge, gradients in factored form, layout on the mesh."""
