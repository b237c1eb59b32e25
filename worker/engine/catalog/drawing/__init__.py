"""Pictures, tables and colours of pages for people, which the report and the dashboard share."""
