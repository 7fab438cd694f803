"""Forecasts of a gridded field, such as the sea surface temperature."""
