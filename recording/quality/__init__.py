"""How good a dataset of posed, masked views is, and if it is not, why.

measure.py    one sample: masks, brightness, sharpness, cameras, silhouettes
tangency.py   whether silhouettes and cameras belong together, to parts of a pixel
diagnose.py   which fault explains silhouettes that do not
dataset.py    finding and measuring the samples of any dataset, in several processes
summary.py    figures per view and for the dataset
findings.py   the grade, its reasons, and what to do about each
page.py       all of it as one HTML page
"""
