"""Results of a run: forecasts as files, reports as plots and pages."""
