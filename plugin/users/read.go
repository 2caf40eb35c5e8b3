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

// Package users finds out which users and groups an image has, from its layers
// as a registry stores them, without keeping anything else of the image: it
// reads the layers from the top down, in memory, and stops as soon as the
// contents of /etc/passwd and /etc/group are certain. It keeps what it found for
// the containers of the image, and lays it out as a directory where containerd
// looks. It also makes these two files from an administrator's list.
//
// What a layer does to the files of the layers below it is what containerd's
// overlay snapshotter makes of it (containerd, pkg/archive/tar.go, and the
// kernel's overlayfs), so that the result is what a look-up in the image's
// unpacked root filesystem would find.
//
// A layer is either not read at all, or read to its end and held against its
// digest and its diff ID before anything in it, or missing from it, counts. A
// result therefore follows from the image's chain ID alone, and can be shared
// by whatever has the same chain ID. This is also why tables of contents that
// some layers have (eStargz, zstd:chunked) are not used: they would save
// reading a layer to its end, but only the manifest vouches for them, not the
// chain ID. With them, anybody who can push an image could make up the users of
// somebody else's.
package users

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Files are the contents of the two files. One that the image does not have is
// nil; an empty one is not.
type Files struct {
	Passwd []byte
	Group  []byte
}

// Equal tells whether both files are the same, missing ones included.
func (f Files) Equal(o Files) bool {
	return (f.Passwd == nil) == (o.Passwd == nil) && bytes.Equal(f.Passwd, o.Passwd) &&
		(f.Group == nil) == (o.Group == nil) && bytes.Equal(f.Group, o.Group)
}

// Layer is a layer of an image: what the manifest and what the config say of it.
type Layer struct {
	Descriptor ocispec.Descriptor
	DiffID     digest.Digest
}

// Fetch opens the stored (compressed) content of a layer. It is called again
// for the same layer when that has to be read once more.
type Fetch func(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error)

// Stats says what a result has cost.
type Stats struct {
	// Layers is the number of layers that were read.
	Layers int
	// Bytes is the number of bytes that were fetched, as stored in the registry.
	Bytes int64
}

// Read returns the files of the image with these layers, the lowest first.
//
// An error wraps
//   - ErrUnusable when it lies in the image, and another attempt gives the same:
//     a layer that is needed is encrypted or in an unknown format, a file is
//     larger than MaxFileSize or no regular file, links go round in circles, or a
//     limit is crossed, which the error names;
//   - errdefs.ErrDataLoss when a layer is not what its digest or its diff ID
//     says;
//   - the error of fetch, or of what it returned;
//   - the cause of the context's end, which is noticed within milliseconds.
//
// Stats are valid with an error too.
func Read(ctx context.Context, layers []Layer, fetch Fetch) (Files, Stats, error) {
	r := newReader(ctx, layers, fetch)
	files, err := r.read(ctx)
	return files, r.stats, err
}

func newReader(ctx context.Context, layers []Layer, fetch Fetch) *reader {
	r := &reader{layers: make([]*layerView, len(layers)), fetch: fetch, budget: budget{ctx: ctx, free: freeRatio}}
	for i := range layers {
		// Top first, from here on.
		r.layers[i] = &layerView{Layer: layers[len(layers)-1-i]}
	}
	return r
}

func (r *reader) read(ctx context.Context) (files Files, err error) {
	for _, name := range []string{passwd, group} {
		if err := r.want(split(name)); err != nil {
			return Files{}, err
		}
	}
	if files.Passwd, err = r.file(ctx, passwd); err != nil {
		return Files{}, err
	}
	if files.Group, err = r.file(ctx, group); err != nil {
		return Files{}, err
	}
	return files, nil
}

const (
	passwd = "etc/passwd"
	group  = "etc/group"
)

// reader has what is known of the layers so far.
type reader struct {
	layers []*layerView // the topmost first
	fetch  Fetch
	stats  Stats

	budget
	wanted wanted // the paths to learn about, and the directories above them
	paths  int    // the number of paths in wanted
	gen    int    // counts up with every reading of a layer
	trail  []step // of the last path that was looked up in a layer
}

// wanted is a tree of path components.
type wanted struct {
	gen      int // the reading before which it was added
	children map[string]*wanted
}

// layerView is what a layer says of the wanted paths.
type layerView struct {
	Layer
	scans int
	gen   int   // the reading that root is from; it knows what was wanted then
	kept  int   // bytes of files in root
	root  *node // nil as long as the layer was not read
}

type kind int

const (
	directory kind = iota
	regular
	tooLarge // a regular file larger than MaxFileSize
	symlink
	hardlink // a link to a file of the same layer that was not wanted when it went by
	whiteout
	special // anything else
)

// node is a file of one layer.
type node struct {
	kind     kind
	children map[string]*node
	opaque   bool
	data     []byte
	target   string
}

// want adds a path to those that the readings from now on keep.
func (r *reader) want(path []string) error {
	if err := r.step(len(path)); err != nil {
		return err
	}
	w := &r.wanted
	for _, c := range path {
		next := w.children[c]
		if next == nil {
			if r.paths++; r.paths > maxWanted {
				return beyond("the way to the file goes through too many links", maxWanted, "path components on the way")
			}
			next = &wanted{gen: r.gen + 1}
			if w.children == nil {
				w.children = map[string]*wanted{}
			}
			w.children[strings.Clone(c)] = next
		}
		w = next
	}
	return nil
}

// knows tells whether the last reading of a layer kept what it says of a path.
func (r *reader) knows(l *layerView, path []string) bool {
	if l.root == nil {
		return false
	}
	w := &r.wanted
	for _, c := range path {
		if w = w.children[c]; w == nil || w.gen > l.gen {
			return false
		}
	}
	return true
}

// file returns a file's content, following links inside the image's root, or
// nil if there is no such file. It reads the layers that it needs to.
func (r *reader) file(ctx context.Context, name string) ([]byte, error) {
	for {
		content, need, err := r.resolve(name)
		if err != nil {
			return nil, fmt.Errorf("/%s of the image: %w", name, err)
		}
		if need == nil {
			return content, nil
		}
		if err := r.want(need.path); err != nil {
			return nil, fmt.Errorf("/%s of the image: %w", name, err)
		}
		l := r.layers[need.layer]
		if err := r.readLayer(ctx, l); err != nil {
			return nil, fmt.Errorf("look for /%s of the image in layer %s: %w", name, l.Descriptor.Digest, err)
		}
	}
}

// need is what keeps resolve from an answer: what a layer says of a path.
type need struct {
	layer    int
	path     []string
	complete bool // whether path is that of a file, not of a directory on the way
}

// resolve looks a file up in what is known of the layers.
func (r *reader) resolve(name string) ([]byte, *need, error) {
	todo := todo{name}
	var path []string // of directories, links resolved
	links := 0
	for {
		c, ok := todo.next()
		if !ok {
			return nil, nil, unusable("it is not a regular file")
		}
		if err := r.step(1); err != nil {
			return nil, nil, err
		}
		switch c {
		case ".":
			continue
		case "..":
			path = path[:max(len(path)-1, 0)]
			continue
		}
		if len(path) >= maxDepth {
			return nil, nil, beyond("the way to it is too deep", maxDepth, "directories")
		}
		path = append(path, c)
		found, need, err := r.lookup(path)
		if err != nil {
			return nil, nil, err
		}
		if need != nil {
			// All that follows is wanted too, as far as it is certain.
			need.path = slices.Clone(need.path)
			for !need.complete && len(need.path) <= maxDepth {
				c, ok := todo.next()
				if !ok || c == ".." {
					break
				}
				if c != "." {
					need.path = append(need.path, c)
				}
			}
			return nil, need, nil
		}
		switch {
		case found == nil:
			return nil, nil, nil
		case found.kind == directory:
		case found.kind == symlink:
			if links++; links > maxLinks {
				return nil, nil, beyond("too many symbolic links on the way to it", maxLinks, "links")
			}
			path = path[:len(path)-1]
			if strings.HasPrefix(found.target, "/") {
				path = path[:0]
			}
			todo = append(todo, found.target)
		case !todo.isEmpty():
			return nil, nil, nil // a file where a directory would have to be
		case found.kind == regular:
			return found.data, nil, nil
		case found.kind == tooLarge:
			return nil, nil, unusable(fmt.Sprintf("it is larger than %d bytes", MaxFileSize))
		default:
			return nil, nil, unusable("it is not a regular file")
		}
	}
}

// todo are paths that remain to be walked, the last one first.
type todo []string

// next takes the next component.
func (t *todo) next() (string, bool) {
	for len(*t) > 0 {
		last := &(*t)[len(*t)-1]
		*last = strings.TrimLeft(*last, "/")
		if *last != "" {
			var c string
			c, *last, _ = strings.Cut(*last, "/")
			return c, true
		}
		*t = (*t)[:len(*t)-1]
	}
	return "", false
}

// isEmpty tells whether nothing but slashes remains.
func (t todo) isEmpty() bool {
	return !slices.ContainsFunc(t, func(path string) bool { return strings.Trim(path, "/") != "" })
}

// lookup finds what is at a path whose parent is a directory; nil is nothing.
func (r *reader) lookup(path []string) (*node, *need, error) {
layers:
	for i, l := range r.layers {
		if err := r.step(len(path)); err != nil {
			return nil, nil, err
		}
		if l.root == nil {
			return nil, &need{layer: i, path: path}, nil
		}
		n := l.root
		last := false // whether the layers below are hidden
		for j, c := range path {
			last = last || n.opaque
			next := n.children[c]
			switch {
			case next == nil && !r.knows(l, path[:j+1]):
				return nil, &need{layer: i, path: path}, nil
			case next == nil && last:
				return nil, nil, nil
			case next == nil:
				continue layers
			case j < len(path)-1 && next.kind != directory:
				// A directory of this name above is a new one.
				return nil, nil, nil
			}
			n = next
		}
		switch n.kind {
		case whiteout:
			return nil, nil, nil
		case hardlink:
			return nil, &need{layer: i, path: split(n.target), complete: true}, nil
		default:
			return n, nil, nil
		}
	}
	return nil, nil, nil
}

func split(path string) []string {
	return slices.DeleteFunc(strings.Split(path, "/"), func(c string) bool { return c == "" })
}

// ErrUnusable is why an image's users cannot be had from it, whoever tries. Such an
// error wraps errdefs.ErrFailedPrecondition as well, which others may be too: the
// one of a node that is configured to fetch no layer, for instance.
var ErrUnusable = errors.New("unusable")

func unusable(why string) error { return &unusableError{why} }

func isUnusable(err error) bool { return errors.Is(err, ErrUnusable) }

type unusableError struct{ why string }

func (e *unusableError) Error() string   { return e.why }
func (e *unusableError) Unwrap() []error { return []error{ErrUnusable, errdefs.ErrFailedPrecondition} }
