"""Rasterizer backends with one signature: rasterize(gaussians, cameras, background) -> (rgb, alpha, depth)."""
