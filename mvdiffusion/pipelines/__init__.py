"""One picture to N views."""
