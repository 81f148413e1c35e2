"""Stage 1: one picture of an animal to N mutually consistent views (SD 2.1 unCLIP with multi-view attention)."""
