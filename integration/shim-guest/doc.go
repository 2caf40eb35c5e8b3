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

// containerd-shim-guest-v2 is the stand-in guest: TEST EQUIPMENT that takes the
// place of Kata Containers where there is no hypervisor. It is not installed by
// anything and must not be used to isolate a workload: it is runc, with no
// virtual machine around it.
//
// To containerd it is a runtime of type io.containerd.guest.v2. It does with a
// CreateTask request what Kata's shims do with one (package guest says what and
// from which source), and leaves everything after that to containerd's own runc
// shim, which it embeds: start, exec, I/O, statistics, pause, kill, wait,
// delete, events and reconnection after a restart of containerd are the real
// ones.
//
// # What stands for what
//
// The guest of a pod is the mount namespace of the pod's shim process. As with
// the runc shim, the containers of a pod sandbox share one shim (they are
// grouped by the annotation io.kubernetes.cri.sandbox-id); any other container
// has a shim, and so a guest, of its own. Before it serves, the shim moves into
// a new mount namespace, lets mounts of the host come in but none go out, and
// mounts a tmpfs there, which is the guest's disk. Images are pulled once for a
// pod, by the shim's own HTTP client, and unpacked on that tmpfs. Each container
// gets an overlay on top, mounted at its bundle's rootfs inside of the namespace
// only, so that on the host the bundle's rootfs stays an empty directory. The
// namespace and all that is in it go away with the last process in it, also when
// the shim is killed.
//
// A sandbox runs this same binary as its pause process, from a root file system
// with nothing else in it: the host's pause image is not used. So the binary has
// to be linked statically (CGO_ENABLED=0).
//
// With sandboxer = "shim" (configuration: "flavour": "rust"; the Go shim cannot) the
// shim serves containerd's sandbox API. There is no pause container then. A process
// of its own stands in for the virtual machine: it holds the pod's namespaces, and
// when it ends, so do the containers and the sandbox.
//
// # What is like runc and not like a virtual machine
//
// The kernel, the network and the cgroups are the host's. Files that the OCI
// configuration binds from the host (resolv.conf, hosts, the termination log,
// volumes) are bound from the host. Users, groups, arguments and environment are
// those that the host computed, as with Kata's agent, which takes nothing from the
// image's own configuration but the pause program's (src/agent/src/rpc.rs,
// do_create_container). The TaskCreate event carries the mounts
// that were made in the guest, not those that the host asked for.
package main
