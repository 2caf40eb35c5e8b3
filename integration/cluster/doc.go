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

// Package cluster makes a Kubernetes cluster of one node on one machine: an
// unmodified etcd, kube-apiserver and kubelet, with their default feature gates,
// on the containerd of a [harness.Node].
//
//	control, err := cluster.Start(ctx, cluster.Binaries(dir))
//	...
//	kubelet, err := control.StartKubelet(ctx, node, cluster.KubeletOptions{})
//	...
//	err = control.API.Create(ctx, pod)
//
// Neither a scheduler nor a network plugin nor a controller runs. So a pod has to
// name its node, be on the host's network and tolerate every taint, which
// [Kubelet.Pod] sees to.
//
// Everything listens on loopback and asks for a certificate or a token;
// etcd listens on a socket in a directory of root's. Everything is kept in
// temporary directories, but for what kubelet does not let one choose: see
// [Control.StartKubelet].
package cluster
