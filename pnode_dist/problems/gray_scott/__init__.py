"""The Gray-Scott equations."""
