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

package users

import (
	"context"
	"fmt"
)

// MaxFileSize is the size in bytes up to which a file is accepted. containerd
// reads no larger ones (pkg/oci/spec_opts.go, maxUserFileBytes).
const MaxFileSize = 10 << 20

// Limits on what an image can cost. Whoever made it is not trusted: a few hundred
// bytes can say more than a node has time and memory for. An image beyond one of
// them is unusable, and the error names the limit.
//
// They count what is spent. A byte that is unpacked is counted whether it is
// looked at or skipped; a component of a path each time that it is looked up, so
// that links which lead in circles cost what they cost; memory by what nodes and
// maps take, not by the names in them.
const (
	// Of a single entry of a layer, as in Linux (PATH_MAX); one beyond it could
	// not be unpacked either.
	maxPath  = 4096
	maxDepth = 512 // directories

	// Of a layer.
	maxScans  = 8        // readings
	maxWindow = 32 << 20 // bytes of a zstd frame's window: what the largest level of klauspost/compress makes

	// Of an image, over all readings of all its layers.
	maxLinks    = 255      // links on the way to one file, as in containerd's fsview
	maxWanted   = 1024     // components of the paths that are looked for
	maxMemory   = 64 << 20 // bytes of files, and of directories and links
	maxEntries  = 4 << 20
	maxSteps    = 128 << 20 // components of paths that are looked up, and PAX records
	maxFetched  = 32 << 30  // bytes, as stored in the registry
	maxUnpacked = 32 << 30  // bytes, and besides
	maxRatio    = 100       // times the bytes that were fetched, from
	freeRatio   = 1 << 30   // bytes on
)

// What is charged for what has no size of its own.
const (
	nodeSize  = 384 // a file in the tree, its name's place in a map, and the map of a directory
	stepsLook = 4096
)

// budget is what was spent on an image.
type budget struct {
	ctx      context.Context
	fetched  int64
	unpacked int64
	free     int64 // is freeRatio
	entries  int
	steps    int
	files    int // bytes of memory that stay
	tree     int // bytes of memory for the layer that is being read
	look     int // steps since the last look at the context
}

// beyond is the error of an image that is not worth what it costs.
func beyond(what string, limit int64, unit string) error {
	return unusable(fmt.Sprintf("%s: the limit is %d %s", what, limit, unit))
}

// step counts components of paths, or what takes as long.
func (b *budget) step(n int) error {
	if b.steps += n; b.steps > maxSteps {
		return beyond("the layers have too long paths and too many links", maxSteps, "path components looked up")
	}
	if b.look += n; b.look >= stepsLook {
		b.look = 0
		return context.Cause(b.ctx)
	}
	return nil
}

// entry counts an entry of an archive.
func (b *budget) entry() error {
	if b.entries++; b.entries > maxEntries {
		return beyond("the layers have too many files", maxEntries, "entries read")
	}
	return b.step(1)
}

// unpack counts bytes that were made of those that were fetched.
func (b *budget) unpack(n int) error {
	if b.unpacked += int64(n); b.unpacked > maxUnpacked {
		return beyond("the layers are too large", maxUnpacked, "bytes unpacked")
	}
	if b.unpacked > b.free && b.unpacked/maxRatio > b.fetched {
		return beyond("the layers are compressed too well", maxRatio, fmt.Sprintf("times what was fetched, beyond %d bytes unpacked", freeRatio))
	}
	return context.Cause(b.ctx)
}

// fetch makes sure that a layer is not too large to be read.
func (b *budget) fetch(size int64) error {
	if size < 0 {
		return unusable(fmt.Sprintf("the layer has the size %d", size))
	}
	if b.fetched > maxFetched-size {
		return beyond("the layers are too large", maxFetched, "bytes fetched")
	}
	return nil
}

// grow counts memory for the tree of the layer that is being read.
func (b *budget) grow(n int) error {
	if b.tree += n; b.files+b.tree > maxMemory {
		return beyond("the layers have too many links", maxMemory, "bytes of memory")
	}
	return nil
}

// keep counts memory for a file.
func (b *budget) keep(n int) error {
	if b.files += n; b.files+b.tree > maxMemory {
		return beyond("there are too many files that could be the image's users", maxMemory, "bytes of memory")
	}
	return nil
}
