"""The procedural, articulated mouse: splat clouds, rendered samples, moving mice."""
