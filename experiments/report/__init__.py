"""From results files to documents: tables, sections and figures."""
