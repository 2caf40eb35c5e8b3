/*
   Copyright The guest-pull Authors.

   Licensed under the Apache License, Version 2.0 (the "License");
   you may not use this file except in compliance with the License.
   You may obtain a copy of the License at

       http://www.apache.org/licenses/LICENSE-2.0

   Unless required by applicable law or agreed to in writing, software
   distributed under the License is distributed on an "AS IS" BASIS,
   WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
   See the License for the specific language governing permissions and
   limitations under the License.
*/

// Package harness runs a real containerd for tests, on temporary paths, and
// talks to it as kubelet does.
//
// A [Node] is one containerd with its own root, state, socket, configuration
// and cgroups, all of it below one temporary directory; the system's containerd
// is neither used nor touched. [New] starts one for a test and takes care that
// nothing of it is left when the test ends:
//
//	node := harness.New(t, harness.Options{Registry: reg})
//	pod, err := node.RunPod(ctx, harness.PodSpec{Handler: harness.Guest})
//	...
//	c, err := pod.Run(ctx, harness.ContainerSpec{Image: ref})
//
// A program that is not a test uses [Start] and [Node.Close].
//
// After each test that passed, the node is emptied the way kubelet empties one,
// and must then be empty: see [Node.Leftovers].
package harness
