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

// Package guest is what the stand-in guest does with the request to create a
// container. It is test equipment; see the command's documentation.
//
// It reads a request as Kata Containers 4.1.0 does, and refuses what that
// refuses or mishandles. Sources, in the repository
// kata-containers/kata-containers:
//
//   - which mount types the Go shim leaves unmounted on the host:
//     IsNydusRootFSType in src/runtime/virtcontainers/kata_agent.go
//   - the option and its JSON, Go: ParseKataVirtualVolume in
//     src/runtime/virtcontainers/types/virtual_volume.go; Rust: KataVirtualVolume in
//     src/libs/kata-types/src/mount.rs
//   - how many mounts and options, Rust: handler_rootfs in
//     src/runtime-rs/crates/resource/src/rootfs/mod.rs
//   - the image's name and the sandbox: handleImageGuestPullBlockVolume in
//     kata_agent.go, get_image_reference in
//     src/runtime-rs/crates/resource/src/rootfs/virtual_volume.rs
//
// The decoder here is the guest's own. It shares nothing with the encoder of the
// snapshotter, so that the two check each other.
package guest
