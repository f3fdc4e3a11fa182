"""To and from other libraries' models: fold, export, import, and conversion of trained attention."""
