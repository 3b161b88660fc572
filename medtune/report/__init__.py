"""`medtune report`: a study as one HTML file that needs no network, with the answer first.

`page` puts the sections together; each of the other modules makes one or two of them from a `Source`. plotly.js is
embedded once, in full: the Python package ships no smaller bundle, and it is most of the file.
"""
