"""`medtune compare`: the report's Tables 3 to 6 and appendix 7.1 to 7.3 with a study's figures beside them.

`compare` matches trials to the report's settings; trials of one setting are replicates over seeds. `write` leaves two
files, `compare.html` (one file that needs nothing else) and `compare.csv`, one row a figure of the report and section:

| column                                                 | holds                                                        |
| ------------------------------------------------------ | ------------------------------------------------------------ |
| table, model, optimizer, lr, milestones, gamma, metric | which figure of the report; milestones are its epochs        |
| report                                                 | the figure as printed                                        |
| section                                                | `schedule stepped`, or `as run`: the rate stayed as it was   |
| source                                                 | our figure's name in a trial's record: `cpn/oa`              |
| measured_on                                            | images and weights behind our figure                         |
| n, mean, low, high                                     | trials in which ours is defined; empty: none                 |
| difference                                             | mean less report                                             |
| state                                                  | `run`, `not run`, or what became of the trials: `1 RUNNING`  |
| trials                                                 | numbers of the trials trained to the end                     |
| footnote                                               | what is to be known about the report's figure                |
| synthetic                                              | whether ours are from generated images                       |

Rows of the metric `auc_logit` hold our AUC by raw logit beside the report's AUC: as run only, where the record has it.
"""

from medtune.compare.build import Cell, ComparedTable, Comparison, Entry, Section, compare
from medtune.compare.show import flat, print_comparison, text_rows, to_csv, to_html, to_json, write

__all__ = [
    "Cell",
    "ComparedTable",
    "Comparison",
    "Entry",
    "Section",
    "compare",
    "flat",
    "print_comparison",
    "text_rows",
    "to_csv",
    "to_html",
    "to_json",
    "write",
]
