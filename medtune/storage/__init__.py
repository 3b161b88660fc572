"""Where studies are kept, and what happens when that place fails: folders, S3 and GCS.

A study in a folder is worked on where it lies. A study in a bucket is worked on in a local folder of each node, and what was
written there is in the bucket before anybody is told of it (`attempt.py` on a trial's node, `home.py` on the driver's).
"""
