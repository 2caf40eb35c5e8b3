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

// read fetches a layer, takes from it what is wanted, and verifies it.
func (r *reader) read(ctx context.Context, l *layerView) error {
	if l.scans++; l.scans > maxScans {
		return unusable("links lead back to this layer too often")
	}
	if strings.HasSuffix(l.Descriptor.MediaType, "+encrypted") {
		return unusable("the layer is encrypted")
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
	raw := &source{ctx: ctx, r: blob, v: compressed, n: &r.stats.Bytes, left: l.Descriptor.Size}
	r.gen++
	r.kept -= l.kept
	l.root, l.kept = nil, 0
	kept := r.kept
	root, readErr := r.readTar(raw, uncompressed)
	l.kept = r.kept - kept
	if raw.err == nil {
		// Compressed data can be followed by more. And as long as it is not
		// certain that this is the layer, nothing in it is the image's fault.
		_, _ = io.Copy(io.Discard, raw) // raw keeps the error
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
func (r *reader) readTar(raw io.Reader, uncompressed *verifier) (*node, error) {
	stream, err := decompress(raw)
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	tee := io.TeeReader(stream, uncompressed)
	t := &tree{reader: r, start: r.gen, root: &node{}}
	for entries := tar.NewReader(tee); ; {
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
	if _, err := io.Copy(io.Discard, tee); err != nil {
		return nil, malformed(err)
	}
	return t.root.prune(&r.wanted), nil
}

// malformed is for errors of what reads the layer. An error of the layer's
// source is not one, and is told apart by the caller.
func malformed(err error) error {
	if isUnusable(err) {
		return err
	}
	return unusable(fmt.Sprintf("the layer cannot be read: %v", err))
}

// source is a layer as stored. It remembers an error, so that it can be told
// from one of the readers that are stacked on it.
type source struct {
	ctx  context.Context
	r    io.Reader
	v    *verifier
	n    *int64
	left int64 // of the size that the descriptor gives
	err  error
}

func (s *source) Read(p []byte) (int, error) {
	if s.err != nil {
		return 0, s.err
	}
	if err := s.ctx.Err(); err != nil {
		s.err = err
		return 0, err
	}
	n, err := s.r.Read(p)
	s.v.Write(p[:n]) // never fails
	*s.n += int64(n)
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
		z, err := zstd.NewReader(buffered, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(128<<20))
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
type tree struct {
	reader   *reader
	start    int // the reading's number
	root     *node
	symlinks int
}

// place is a path in a tree with its links resolved.
type place struct {
	parent *node   // nil if the tree has no directory there
	wanted *wanted // nil if nothing there is wanted
	dir    []string
	name   string
}

func (p place) String() string { return path.Join(append(p.dir[:len(p.dir):len(p.dir)], p.name)...) }

const whiteoutPrefix = ".wh."

// apply does to the tree what containerd does for an entry when it unpacks a
// layer for overlayfs.
func (t *tree) apply(h *tar.Header, content io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	p, err := t.locate(h.Name, true)
	if err != nil {
		return err
	}
	if p.name == "" {
		return nil // the root itself
	}
	if p.name == whiteoutPrefix+whiteoutPrefix+".opq" {
		if p.parent != nil {
			p.parent.opaque = true
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
	} else if n, err = t.node(h, p, content); err != nil {
		return err
	}
	return t.put(p, n)
}

// node makes the file that an entry is about.
func (t *tree) node(h *tar.Header, p place, content io.Reader) (*node, error) {
	switch h.Typeflag {
	case tar.TypeDir:
		return &node{kind: directory, opaque: h.PAXRecords["SCHILY.xattr.trusted.overlay.opaque"] == "y"}, nil
	case tar.TypeReg:
		if !p.isWanted() {
			return &node{kind: regular}, nil
		}
		// The header's size is not what counts: a sparse file is larger.
		data, err := io.ReadAll(io.LimitReader(content, MaxFileSize+1))
		if err != nil {
			return nil, err
		}
		if len(data) > MaxFileSize {
			return &node{kind: tooLarge}, nil
		}
		if t.reader.kept += len(data); t.reader.kept > maxKept {
			return nil, unusable("there are too many files that could be the image's users")
		}
		return &node{kind: regular, data: data}, nil
	case tar.TypeSymlink:
		if t.symlinks += len(h.Name) + len(h.Linkname) + 64; t.symlinks > maxSymlink {
			return nil, unusable("the layer has too many symbolic links")
		}
		return &node{kind: symlink, target: h.Linkname}, nil
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
	if p.parent != nil {
		if n := p.parent.children[p.name]; n != nil && n.kind != directory {
			return n, nil
		}
	}
	if p.wanted != nil {
		if w := p.wanted.children[p.name]; w != nil && w.gen <= t.start {
			return nil, fmt.Errorf("entry %q is a hard link to %q, which is not there", h.Name, h.Linkname)
		}
	}
	return &node{kind: hardlink, target: p.String()}, nil
}

// put replaces what is at a place. Directories are merged.
func (t *tree) put(p place, n *node) error {
	if !p.isWanted() && n.kind != symlink {
		if p.parent == nil {
			return nil
		}
		if old := p.parent.children[p.name]; old != nil && (old.kind != directory || n.kind != directory) {
			delete(p.parent.children, p.name)
		}
		return nil
	}
	if p.parent == nil {
		// A link in a directory that is not in the tree.
		p.parent = t.root
		for _, c := range p.dir {
			p.parent = p.parent.subdirectory(c)
		}
	}
	if old := p.parent.children[p.name]; old != nil && old.kind == directory && n.kind == directory {
		old.opaque = old.opaque || n.opaque
		return nil
	}
	if p.parent.children == nil {
		p.parent.children = map[string]*node{}
	}
	p.parent.children[p.name] = n
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
	dir := split(path.Join("/", strings.Join(p.dir, "/"), target))
	if strings.HasPrefix(target, "/") {
		dir = split(path.Clean(target))
	}
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
	below(p.wanted.children[p.name], dir)
	for _, to := range paths {
		if err := t.reader.want(to); err != nil {
			return err
		}
	}
	return nil
}

func (p place) isWanted() bool { return p.wanted != nil && p.wanted.children[p.name] != nil }

// locate finds where a name is in the tree: its last component is not resolved,
// links among the others are. With create, directories on the way come into
// being, as they do when containerd unpacks a layer.
func (t *tree) locate(name string, create bool) (place, error) {
	pending := split(path.Clean("/" + name))
	if len(pending) == 0 {
		return place{parent: t.root, wanted: &t.reader.wanted}, nil
	}
	last := pending[len(pending)-1]
	pending = pending[:len(pending)-1]

	p := place{parent: t.root, wanted: &t.reader.wanted, name: last}
	for links := 0; len(pending) > 0; {
		c := pending[0]
		pending = pending[1:]
		switch c {
		case ".":
			continue
		case "..":
			p = t.at(p.dir[:max(len(p.dir)-1, 0)], last)
			continue
		}
		var child *node
		if p.parent != nil {
			child = p.parent.children[c]
		}
		if child != nil && child.kind == symlink {
			if links++; links > maxLinks {
				return place{}, unusable(fmt.Sprintf("the layer has an entry %q behind too many symbolic links", name))
			}
			if strings.HasPrefix(child.target, "/") {
				p = t.at(nil, last)
			}
			pending = append(split(child.target), pending...)
			continue
		}
		if child != nil && child.kind == whiteout && create {
			// The directory is a new one, not the one below.
			*child = node{kind: directory, opaque: true}
		}
		if child != nil && child.kind != directory {
			return place{}, fmt.Errorf("entry %q is below a file that is no directory", name)
		}
		w := p.wanted
		if w != nil {
			w = w.children[c]
		}
		if child == nil && w != nil && p.parent != nil && create {
			child = p.parent.subdirectory(c)
		}
		p = place{parent: child, wanted: w, dir: append(p.dir[:len(p.dir):len(p.dir)], c), name: last}
	}
	return p, nil
}

// at returns the place of a name in a directory that has no links in its path.
func (t *tree) at(dir []string, name string) place {
	p := place{parent: t.root, wanted: &t.reader.wanted, dir: dir, name: name}
	for _, c := range dir {
		if p.parent != nil {
			p.parent = p.parent.children[c]
		}
		if p.wanted != nil {
			p.wanted = p.wanted.children[c]
		}
	}
	return p
}

func (n *node) subdirectory(name string) *node {
	if n.children[name] == nil {
		if n.children == nil {
			n.children = map[string]*node{}
		}
		n.children[name] = &node{kind: directory}
	}
	return n.children[name]
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
