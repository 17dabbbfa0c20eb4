# SPDX-License-Identifier: Apache-2.0
"""The web service: predictions on demand, as a page and as an API."""
