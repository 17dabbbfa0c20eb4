# SPDX-License-Identifier: Apache-2.0
"""Prediction for tables of any size: plan it, compute its work units, merge them."""
