"""The dashboard: pages for people, made by the server, which show what the JSON API tells and do what it does."""

from app.dashboard import compare, forms, jobs, queue, sessions, statistics, trying

routers = [module.router for module in (sessions, jobs, trying, forms, compare, queue, statistics)]
