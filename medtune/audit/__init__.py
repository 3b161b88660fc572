"""Near-duplicates within and between train, val, test and the external set, and what they mean for external figures.

`<study>/audit.json`, and `medtune data audit --json`, hold:

| key                              | holds                                                                            |
| -------------------------------- | -------------------------------------------------------------------------------- |
| words                            | the verdict in one sentence                                                      |
| images                           | images by split                                                                  |
| leaked                           | `external in train`, ...: `of` how many images how many have a partner that is   |
|                                  | `exact`, `perceptual` (hash), `correlated`; `near`: exact or correlated;         |
|                                  | `other_label`: one with another label                                            |
| baseline                         | the same, as shares, of test images in train: what is usual for these images     |
| usual                            | correlation finds too many in the baseline: `near` is exact alone                |
| external_leaked                  | positions of external images with a near-duplicate in any split of the training  |
|                                  | set; in a study's file in the order of its predictions                           |
| external_seen                    | those of them with one in train or val, which models are trained and chosen on   |
| worst                            | the likest pairs of images of each pair of splits                                |
| threshold, distance              | correlation, and bits of the hash, that make a partner                           |
| pair, external_name, digests,    | of which images                                                                  |
| own_test                         |                                                                                  |
"""

from medtune.audit.verdict import FILE, sentence, verdict_of

__all__ = ["FILE", "sentence", "verdict_of"]
