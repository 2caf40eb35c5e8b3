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

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// labelSnapshotRef is the label by which the unpacker names the layer that it asks
// for (core/snapshots/snapshotter.go, LabelSnapshotRef, which containerd exports
// from 2.4 on).
const labelSnapshotRef = "containerd.io/snapshot.ref"

// isLayer tells whether a snapshot's name is that of an image layer. A layer is
// named by its bare chain ID; every other name that reaches a snapshotter from
// containerd's metadata store looks like "k8s.io/12/..." (core/metadata/snapshot.go,
// createKey).
func isLayer(name string) bool {
	return digest.Digest(name).Validate() == nil
}

// layerInfo describes a layer that has no row in the store. It has no
// timestamps of its own: the metadata store overlays those, and the parent.
func layerInfo(name string) snapshots.Info {
	return snapshots.Info{
		Kind:   snapshots.KindCommitted,
		Name:   name,
		Labels: map[string]string{labelSnapshotRef: name},
	}
}

// extraction matches the keys under which image content is unpacked
// (snapshots.UnpackKeyFormat), with and without the metadata store's prefix. Its
// last group is the chain ID of the layer.
var extraction = regexp.MustCompile(`(^|/)` + snapshots.UnpackKeyPrefix + `-\S+ (\S+)$`)

// AskedLayer returns the chain ID of the layer that a Prepare with this key and
// these labels asks for. It is such a request only if it comes from the unpacker,
// which names the layer both in the key and in the label containerd.io/snapshot.ref.
// The label alone is nothing: containerd makes one of an annotation of that name,
// which whoever writes a pod may choose (internal/cri/server/podsandbox,
// sandbox_run.go).
func AskedLayer(key string, labels map[string]string) (chainID string, ok bool) {
	m := extraction.FindStringSubmatch(key)
	if m == nil || !isLayer(m[2]) || labels[labelSnapshotRef] != m[2] {
		return "", false
	}
	return m[2], true
}

// imageVolume matches the keys of OCI image volumes
// (containerd, internal/cri/server/helpers.go, getImageVolumeHostPath).
var imageVolume = regexp.MustCompile(`/image-volumes/[^/]+/[^/]+$`)

// ErrContentOnHost is why a request that would put an image's content on the
// host, or show its absence there, is refused. Such an error wraps
// errdefs.ErrFailedPrecondition as well.
var ErrContentOnHost = errors.New("the guest-pull snapshotter keeps image content off the host")

// refuseContent fails closed: it refuses the preparation of a snapshot that
// would hold an image's content, or show its absence, on the host.
func refuseContent(key, parent string) error {
	if extraction.MatchString(key) {
		return fmt.Errorf("extract a layer into snapshot %q: %w, and the request has no label %s with the same layer as the key, by which it could be left to the guest: "+
			"pull the image for a runtime handler that uses this snapshotter, or unpack it with another snapshotter: %w",
			key, ErrContentOnHost, labelSnapshotRef, errdefs.ErrFailedPrecondition)
	}
	if isLayer(parent) && imageVolume.MatchString(key) {
		return fmt.Errorf("mount an image volume from layer %s: %w, so the volume would be empty: "+
			"use another kind of volume for pods of this runtime handler: %w",
			parent, ErrContentOnHost, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// prepareLayer answers the unpacker: there is nothing to do for a layer, it
// exists by its name. It reads and writes nothing, but for a parent that is not
// a layer.
func (s *snapshotter) prepareLayer(ctx context.Context, target, parent string) error {
	if parent != "" && !isLayer(parent) {
		if _, err := s.Snapshotter.Stat(ctx, parent); err != nil {
			return fmt.Errorf("prepare layer %s: parent %q: %w", target, parent, err)
		}
	}
	return fmt.Errorf("layer %s is left to the guest: %w", target, errdefs.ErrAlreadyExists)
}

// layerQuery matches the one filter by which the metadata store looks for a
// layer that Prepare said to exist (core/metadata/snapshot.go, createSnapshot).
var layerQuery = regexp.MustCompile(`^labels\.` + regexp.QuoteMeta(strconv.Quote(labelSnapshotRef)) + `==([^,"]+),parent==(".*")$`)

// queriedLayer returns the layer that the filters of a walk ask for by name, and
// false for every other walk. Answering from the question needs no memory of
// the Prepare before it, however many run at once.
func queriedLayer(filters []string) (snapshots.Info, bool) {
	if len(filters) != 1 {
		return snapshots.Info{}, false
	}
	m := layerQuery.FindStringSubmatch(filters[0])
	if m == nil || !isLayer(m[1]) {
		return snapshots.Info{}, false
	}
	parent, err := strconv.Unquote(m[2])
	if err != nil {
		return snapshots.Info{}, false
	}
	info := layerInfo(m[1])
	info.Parent = parent
	// The metadata store takes these as the time of its own record.
	info.Created = time.Now().UTC()
	info.Updated = info.Created
	return info, true
}

// updateLayer accepts an update of a layer's labels. They are kept by the
// metadata store; this snapshotter has no use for them.
func updateLayer(info snapshots.Info, fieldpaths []string) (snapshots.Info, error) {
	for _, path := range fieldpaths {
		if path != "labels" && !strings.HasPrefix(path, "labels.") {
			return snapshots.Info{}, fmt.Errorf("update field %q of layer %s: only labels can be updated: %w", path, info.Name, errdefs.ErrInvalidArgument)
		}
	}
	updated := layerInfo(info.Name)
	maps.Copy(updated.Labels, info.Labels)
	updated.Updated = time.Now().UTC()
	return updated, nil
}

// walkKnown calls fn for the top layers of images whose users are known.
func (s *snapshotter) walkKnown(ctx context.Context, fn snapshots.WalkFunc) error {
	chains, err := s.users.Known()
	if err != nil {
		return err
	}
	for _, chain := range chains {
		if _, err := s.Snapshotter.Stat(ctx, chain); err == nil {
			continue // has a row, which is in the list already
		}
		if err := fn(ctx, layerInfo(chain)); err != nil {
			return err
		}
	}
	return nil
}
