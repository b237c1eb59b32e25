"""Documents that a job leaves for people and programs beside the weights: report page, `report.json`, model card."""
