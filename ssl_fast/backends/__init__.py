"""The backends that compute the ops, and the dispatcher that chooses between them."""
