"""What gets deployed: a bundle of one trial's weights with all that is needed to use and to judge them, and its use.

`bundle.py` the folder, sealed; `export.py` makes one; `predictor.py` loads one and predicts; `images.py` reads images;
`likeness.py` tells images that are unlike the training images; `gradcam.py` shows what a decision rests on.
"""
