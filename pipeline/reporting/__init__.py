"""The report: typed results, the page, its figures, and the rows of the paper."""
