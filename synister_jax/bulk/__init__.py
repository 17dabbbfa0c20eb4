# SPDX-License-Identifier: Apache-2.0
"""Prediction of any size: it is planned, computed in units, and merged."""
