"""HTML reports of test results: per-user details, bootstrap intervals, plots, comparisons of runs."""
