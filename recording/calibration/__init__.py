"""Calibration files of every usual format <-> `model.Calibration`: formats.py reads and writes, checks.py judges."""
