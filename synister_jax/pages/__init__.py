# SPDX-License-Identifier: Apache-2.0
"""The HTML report: its sections, templates, script and style."""
