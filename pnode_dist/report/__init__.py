"""The results of a run for its readers: forecasts as files, reports as pictures and pages."""
