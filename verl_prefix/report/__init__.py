"""`verl-prefix report`: runs as one HTML file that needs no network.

`curves` reads metrics, `rollouts` samples the rollout log within a budget, `differences` compares configurations, and
`page` puts them into HTML as data; `page.js` draws. What models and data files wrote is untrusted throughout.
"""
