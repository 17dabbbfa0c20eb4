// SPDX-License-Identifier: Apache-2.0
// The state that the modules of the page share.

export const state = {
  session: null,
  models: [],
  shown: null, // name of the view
  left: [], // the tasks to stop when the user leaves the view
  parting: "", // the message to show in the next view
};
