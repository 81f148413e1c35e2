"""The multi-view attention processor and the UNet it lives in."""
