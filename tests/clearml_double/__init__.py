"""The parts of the double of ClearML's server; clearml_server.py puts them together."""
