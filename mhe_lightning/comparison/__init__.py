"""What finished runs say about their attentions: tables, plots, and one page with both."""
