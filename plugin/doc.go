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

// Package plugin registers the guest-pull snapshotter with containerd, as
// io.containerd.snapshotter.v1.guest-pull. Import it for that effect alone; the
// packages below register nothing and can be used by themselves:
//
//	volume       the option that tells a Kata runtime to pull in the guest
//	users        the users and groups of images: reads, keeps and lays them out
//	snapshotter  the snapshotter: layers are names, containers are overlays
//	metrics      wraps a snapshotter, counts, times and traces its calls
//	plugin       this: configuration, what the plugin exports, warnings at start
//
// Dependencies go from the bottom of this list to the top only.
//
// # What happens when an image is pulled
//
// containerd fetches the manifest and the config. For each layer its unpacker
// calls Prepare with the label containerd.io/snapshot.ref, which names the chain
// ID of the layer, as the key does. The snapshotter answers
// errdefs.ErrAlreadyExists: it has that layer. The metadata store looks for it
// with Walk, by the one filter that it uses for this, and records it. The unpacker
// finds the record with Stat, and does not fetch the layer.
//
// None of these answers needs memory. A chain ID is the only name without a
// prefix that the metadata store gives to a snapshot, so that a name alone tells
// that it is a layer's; and what exists by its name cannot get lost.
//
// # What happens when a container is created
//
// containerd calls Prepare with the top layer as the parent. This is a snapshot
// with state, and the embedded overlay snapshotter keeps it: a row, and two
// directories. It is stored without its parent and with the parent's chain ID in
// a label, because the layer has no row that a tree of snapshots could be built
// on. The mount that is returned has a type that Kata's runtimes do not mount on
// the host, and an option that makes them have the image pulled in the guest.
//
// # What may not change
//
// A reader of this package has to be able to rely on the following, and the tests
// hold it: preparing a layer writes nothing; Mounts gives what Prepare gave, also
// after a restart; no request puts a layer's content on the host; a damaged
// database, a lost directory or a full disk never takes containerd down; no
// secret gets into a mount option, a label or a log.
package plugin
