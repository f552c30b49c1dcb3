"""The report: a page and a contact sheet of references and results."""
