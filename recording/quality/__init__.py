"""Do images, masks and cameras belong together: of a calibration, of a recording, and of any dataset.

silhouettes.py  the measure, to parts of a pixel, and which usual fault explains what is left
belongs.py      whether a calibration belongs to its videos, asked before an import
measure.py      figures of samples and views
findings.py     the one list of findings, each with its remedy, and the grade
report.py       quality_report.json and quality_report.html, of an import and of any dataset
check.py        a look at a calibration alone (--check)
"""
