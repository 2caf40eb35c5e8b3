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
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

// readLayer fetches a layer, takes from it what is wanted, and verifies it.
func (r *reader) readLayer(ctx context.Context, l *layerView) error {
	if l.scans++; l.scans > maxScans {
		return beyond("links lead back to this layer too often", maxScans, "readings of a layer")
	}
	if strings.HasSuffix(l.Descriptor.MediaType, "+encrypted") {
		return unusable("the layer is encrypted")
	}
	if err := r.budget.fetch(l.Descriptor.Size); err != nil {
		return err
	}
	compressed, err := newVerifier("digest", l.Descriptor.Digest)
	if err != nil {
		return err
	}
	uncompressed, err := newVerifier("diff ID", l.DiffID)
	if err != nil {
		return err
	}

	blob, err := r.fetch(ctx, l.Descriptor)
	if err != nil {
		return err
	}
	defer blob.Close()
	if l.scans == 1 {
		r.stats.Layers++
	}
	raw := &source{ctx: ctx, r: blob, v: compressed, b: &r.budget, left: l.Descriptor.Size}
	r.gen++
	r.files -= l.kept
	l.root, l.kept = nil, 0
	kept := r.files
	root, readErr := r.readTar(raw, uncompressed)
	l.kept = r.files - kept
	if raw.err == nil {
		// Compressed data can be followed by more. And as long as it is not
		// certain that this is the layer, nothing in it is the image's fault.
		_, _ = io.Copy(io.Discard, raw) // raw keeps the error
	}
	r.stats.Bytes = r.fetched
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if raw.err != nil {
		return raw.err
	}
	if err := compressed.verify(); err != nil {
		return err
	}
	if readErr != nil {
		return readErr
	}
	if err := uncompressed.verify(); err != nil {
		return err
	}
	l.root, l.gen = root, r.gen
	return nil
}

// readTar decompresses a layer and reads it to its end.
//
// The archive is read by archive/tar. What unpacks archives safely as well
// (google/safearchive, containerd's pkg/archive) keeps them from writing outside a
// directory, which nothing here does, and does not bound what it spends.
func (r *reader) readTar(raw io.Reader, uncompressed *verifier) (*node, error) {
	stream, err := decompress(raw)
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	r.tree = 0
	t := &tree{reader: r, start: r.gen, root: &node{}}
	whole := &unpacked{r: stream, v: uncompressed, b: &r.budget}
	for entries := tar.NewReader(whole); ; {
		header, err := entries.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			err = t.apply(header, entries)
		}
		if err != nil {
			return nil, malformed(err)
		}
	}
	if _, err := io.Copy(io.Discard, whole); err != nil {
		return nil, malformed(err)
	}
	return t.root.prune(&r.wanted), nil
}

// unpacked is a layer as it was before it was compressed.
type unpacked struct {
	r io.Reader
	v *verifier
	b *budget
}

func (u *unpacked) Read(p []byte) (int, error) {
	n, err := u.r.Read(p[:min(len(p), 64<<10)]) // a look at the context after each
	u.v.Write(p[:n])                            // never fails
	if spent := u.b.unpack(n); spent != nil {
		return n, spent
	}
	return n, err
}

// malformed is for errors of what reads the layer. An error of the layer's
// source is not one, and is told apart by the caller.
func malformed(err error) error {
	if isUnusable(err) {
		return err
	}
	if errors.Is(err, zstd.ErrWindowSizeExceeded) {
		return beyond("the layer is compressed with too large a window", maxWindow, "bytes")
	}
	return unusable(fmt.Sprintf("the layer cannot be read: %v", err))
}

// source is a layer as stored. It remembers an error, so that it can be told
// from one of the readers that are stacked on it.
type source struct {
	ctx  context.Context
	r    io.Reader
	v    *verifier
	b    *budget
	left int64 // of the size that the descriptor gives
	err  error
}

func (s *source) Read(p []byte) (int, error) {
	if s.err != nil {
		return 0, s.err
	}
	if err := context.Cause(s.ctx); err != nil {
		s.err = err
		return 0, err
	}
	n, err := s.r.Read(p)
	s.v.Write(p[:n]) // never fails
	s.b.fetched += int64(n)
	if s.left -= int64(n); s.left < 0 {
		err = fmt.Errorf("the layer that was fetched is larger than its descriptor says: %w", errdefs.ErrDataLoss)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}

// verifier is a digest of what was read and the one that it should be.
type verifier struct {
	hash.Hash
	what string
	want digest.Digest
}

func newVerifier(what string, d digest.Digest) (*verifier, error) {
	if err := d.Validate(); err != nil {
		return nil, unusable(fmt.Sprintf("the layer has an invalid %s %q: %v", what, d, err))
	}
	return &verifier{Hash: d.Algorithm().Hash(), what: what, want: d}, nil
}

func (v *verifier) verify() error {
	if got := digest.NewDigest(v.want.Algorithm(), v.Hash); got != v.want {
		return fmt.Errorf("the layer that was fetched has the %s %s instead of %s: %w", v.what, got, v.want, errdefs.ErrDataLoss)
	}
	return nil
}

// decompress tells the compression by the first bytes, as containerd does
// (pkg/archive/compression), not by the media type.
func decompress(r io.Reader) (io.ReadCloser, error) {
	buffered := bufio.NewReaderSize(r, 64<<10)
	magic, err := buffered.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(buffered)
		if err != nil {
			return nil, malformed(err)
		}
		return z, nil
	case bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}),
		len(magic) == 4 && magic[0]&0xf0 == 0x50 && bytes.Equal(magic[1:], []byte{0x2a, 0x4d, 0x18}): // a skippable frame
		z, err := zstd.NewReader(buffered, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, malformed(err)
		}
		return z.IOReadCloser(), nil
	}
	return io.NopCloser(buffered), nil
}

// tree is the root directory of a layer while the layer is being unpacked. Of
// all files it has only the wanted ones, the directories above them, and all
// symbolic links, as files can be unpacked through these.
//
// Nothing in it may be a part of a string of the archive's: a short name would keep
// the header alive that it is cut from, which can have a megabyte.
type tree struct {
	*reader
	start int // the reading's number
	root  *node
}

// place is a path in a tree with its links resolved: a name in the directory that
// the last step of the trail is.
type place struct {
	trail []step // valid until the next place is located
	name  string // "" is the root itself
}

// step is a directory on the way to a place.
type step struct {
	name   string
	node   *node   // nil if the tree has no directory there
	wanted *wanted // nil if nothing there is wanted
}

func (p place) dir() step { return p.trail[len(p.trail)-1] }

func (p place) isWanted() bool {
	w := p.dir().wanted
	return w != nil && w.children[p.name] != nil
}

// String returns the path, without a slash in front.
func (p place) String() string {
	names := make([]string, 0, len(p.trail))
	for _, s := range p.trail[1:] {
		names = append(names, s.name)
	}
	return strings.Join(append(names, p.name), "/")
}

const whiteoutPrefix = ".wh."

// apply does to the tree what containerd does for an entry when it unpacks a
// layer for overlayfs.
func (t *tree) apply(h *tar.Header, content io.Reader) error {
	if err := t.entry(); err != nil {
		return err
	}
	if err := t.budget.step(len(h.PAXRecords)); err != nil {
		return err
	}
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	p, err := t.locate(h.Name, true)
	if err != nil {
		return err
	}
	if p.name == "" {
		return nil
	}
	if p.name == whiteoutPrefix+whiteoutPrefix+".opq" {
		if dir := p.dir().node; dir != nil {
			dir.opaque = true
		}
		return nil
	}
	n := &node{}
	if name, ok := strings.CutPrefix(p.name, whiteoutPrefix); ok {
		if name == "" || name == "." || name == ".." {
			return unusable(fmt.Sprintf("the layer has a whiteout of nothing, %q", h.Name))
		}
		p.name = name
		n.kind = whiteout
	} else {
		if n, err = t.node(h, p, content); err != nil {
			return err
		}
		if h.Typeflag == tar.TypeLink {
			// Its target was located since.
			if p, err = t.locate(h.Name, true); err != nil {
				return err
			}
		}
	}
	return t.put(p, n)
}

// node makes the file that an entry is about.
func (t *tree) node(h *tar.Header, p place, content io.Reader) (*node, error) {
	switch h.Typeflag {
	case tar.TypeDir:
		return &node{kind: directory, opaque: h.PAXRecords["SCHILY.xattr.trusted.overlay.opaque"] == "y"}, nil
	case tar.TypeReg:
		switch {
		case !p.isWanted():
			return &node{kind: regular}, nil
		case h.Size > MaxFileSize:
			return &node{kind: tooLarge}, nil
		}
		// What is not in the archive costs as well: a sparse file is larger than
		// what is there of it.
		if err := errors.Join(t.keep(int(h.Size)), t.unpack(int(h.Size))); err != nil {
			return nil, err
		}
		data := make([]byte, h.Size)
		if _, err := io.ReadFull(content, data); err != nil {
			return nil, fmt.Errorf("entry %q: %w", h.Name, err)
		}
		return &node{kind: regular, data: data}, nil
	case tar.TypeSymlink:
		if len(h.Linkname) > maxPath {
			return nil, beyond(fmt.Sprintf("the symbolic link %.64q... has too long a target", h.Name), maxPath, "bytes")
		}
		return &node{kind: symlink, target: strings.Clone(h.Linkname)}, t.grow(len(h.Linkname))
	case tar.TypeLink:
		if !p.isWanted() {
			return &node{kind: special}, nil
		}
		return t.link(h)
	case tar.TypeChar:
		if h.Devmajor == 0 && h.Devminor == 0 {
			return &node{kind: whiteout}, nil
		}
		return &node{kind: special}, nil
	case tar.TypeBlock, tar.TypeFifo:
		return &node{kind: special}, nil
	}
	return nil, fmt.Errorf("entry %q has the unknown type %q", h.Name, h.Typeflag)
}

// link makes a hard link: the same file as the one linked to, which is in the
// same layer.
func (t *tree) link(h *tar.Header) (*node, error) {
	p, err := t.locate(h.Linkname, false)
	if err != nil {
		return nil, err
	}
	dir := p.dir()
	if dir.node != nil {
		if n := dir.node.children[p.name]; n != nil && n.kind != directory {
			return n, nil
		}
	}
	if dir.wanted != nil {
		if w := dir.wanted.children[p.name]; w != nil && w.gen <= t.start {
			return nil, fmt.Errorf("entry %q is a hard link to %q, which is not there", h.Name, h.Linkname)
		}
	}
	target := p.String()
	return &node{kind: hardlink, target: target}, t.grow(len(target))
}

// put replaces what is at a place. Directories are merged.
func (t *tree) put(p place, n *node) error {
	dir := p.dir().node
	if !p.isWanted() && n.kind != symlink {
		if dir == nil {
			return nil
		}
		if old := dir.children[p.name]; old != nil && (old.kind != directory || n.kind != directory) {
			delete(dir.children, p.name)
		}
		return nil
	}
	if dir == nil {
		// A link in a directory that is not in the tree.
		dir = t.root
		for _, s := range p.trail[1:] {
			var err error
			if dir, err = t.subdirectory(dir, s.name); err != nil {
				return err
			}
		}
	}
	if old := dir.children[p.name]; old != nil && old.kind == directory && n.kind == directory {
		old.opaque = old.opaque || n.opaque
		return nil
	}
	if err := t.add(dir, p.name, n); err != nil {
		return err
	}
	if n.kind == symlink && p.isWanted() {
		// What it leads to often comes later in the same layer.
		return t.wantTarget(p, n.target)
	}
	return nil
}

// wantTarget adds what is wanted below a symbolic link to what is wanted below
// its target. It is a guess that saves reading the layer again; the target may
// be behind other links.
func (t *tree) wantTarget(p place, target string) error {
	if !strings.HasPrefix(target, "/") {
		target = path.Dir("/"+p.String()) + "/" + target
	}
	dir := split(path.Clean(target))
	if len(dir) > 32 {
		return nil
	}
	var paths [][]string
	var below func(w *wanted, to []string)
	below = func(w *wanted, to []string) {
		if len(w.children) == 0 {
			paths = append(paths, to)
		}
		for c, next := range w.children {
			below(next, append(to[:len(to):len(to)], c))
		}
	}
	below(p.dir().wanted.children[p.name], dir)
	for _, to := range paths {
		if err := t.want(to); err != nil {
			return err
		}
	}
	return nil
}

// locate finds where a name is in the tree: its last component is not resolved,
// links among the others are. With create, directories on the way come into
// being, as they do when containerd unpacks a layer.
func (t *tree) locate(name string, create bool) (place, error) {
	if len(name) > maxPath {
		return place{}, beyond(fmt.Sprintf("the layer has the entry %.64q..., whose path is too long", name), maxPath, "bytes")
	}
	dirs, last := path.Split(path.Clean("/" + name))
	// A step for each directory. The same memory serves all entries.
	trail := append(t.trail[:0], step{node: t.root, wanted: &t.wanted})
	defer func() { t.trail = trail }()
	links := 0
	for todo := (todo{dirs}); ; {
		c, ok := todo.next()
		if !ok {
			return place{trail, last}, nil
		}
		if err := t.budget.step(1); err != nil {
			return place{}, err
		}
		switch c {
		case ".":
			continue
		case "..":
			trail = trail[:max(len(trail)-1, 1)]
			continue
		}
		dir := trail[len(trail)-1]
		s := step{name: c}
		if dir.node != nil {
			s.node = dir.node.children[c]
		}
		if s.node != nil && s.node.kind == symlink {
			if links++; links > maxLinks {
				return place{}, beyond(fmt.Sprintf("the layer has an entry %q behind too many symbolic links", name), maxLinks, "links")
			}
			if strings.HasPrefix(s.node.target, "/") {
				trail = trail[:1]
			}
			todo = append(todo, s.node.target)
			continue
		}
		if s.node != nil && s.node.kind == whiteout && create {
			// The directory is a new one, not the one below.
			*s.node = node{kind: directory, opaque: true}
		}
		if s.node != nil && s.node.kind != directory {
			return place{}, fmt.Errorf("entry %q is below a file that is no directory", name)
		}
		if dir.wanted != nil {
			s.wanted = dir.wanted.children[c]
		}
		if s.node == nil && s.wanted != nil && dir.node != nil && create {
			var err error
			if s.node, err = t.subdirectory(dir.node, c); err != nil {
				return place{}, err
			}
		}
		if len(trail) > maxDepth {
			return place{}, beyond(fmt.Sprintf("the layer has the entry %.64q..., which is too deep", name), maxDepth, "directories")
		}
		trail = append(trail, s)
	}
}

// subdirectory returns a directory in another one, which may have to be made.
func (t *tree) subdirectory(dir *node, name string) (*node, error) {
	if n := dir.children[name]; n != nil {
		return n, nil
	}
	n := &node{kind: directory}
	return n, t.add(dir, name, n)
}

// add puts a file into a directory.
func (t *tree) add(dir *node, name string, n *node) error {
	if dir.children[name] == nil {
		if err := t.grow(nodeSize + len(name)); err != nil {
			return err
		}
		name = strings.Clone(name)
	}
	if dir.children == nil {
		dir.children = map[string]*node{}
	}
	dir.children[name] = n
	return nil
}

// prune drops what is not wanted.
func (n *node) prune(w *wanted) *node {
	for name, child := range n.children {
		next := w.children[name]
		if next == nil {
			delete(n.children, name)
			continue
		}
		child.prune(next)
	}
	return n
}
