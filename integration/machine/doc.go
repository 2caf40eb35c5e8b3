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

// Package machine boots a virtual machine with Debian on it, for tests that need
// what a test cannot have on the machine it runs on: a systemd that runs everything,
// cgroup v2, a kernel of its own, a reboot, and a power cut.
//
//	m, err := machine.Start(ctx, machine.Options{Root: dir, ...})
//	...
//	out, err := m.Run(ctx, "systemctl is-system-running")
//	...
//	err = m.Cut(random) // what was not flushed is lost, or not
//	err = m.Boot(ctx)
//
// The machine is QEMU's, with KVM where that starts a kernel and with software
// emulation elsewhere. It has one disk, see [Machine.Cut], and one network card, of
// QEMU's user networking: it reaches servers on the loopback of the machine that runs
// the test, where its own are reached too. Its console is kept in a file.
package machine
