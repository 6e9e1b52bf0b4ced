"""Calibration data and INT8 quantisation. Import the modules; this package loads nothing by itself."""
