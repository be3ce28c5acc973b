"""Renders results files as Markdown pages and figures."""
