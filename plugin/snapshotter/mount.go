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
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/guest-pull/guest-pull-snapshotter/plugin/volume"
)

// metadataLabels are the labels of a snapshot that get into its mount option, besides
// the chain ID. Others do not: the option is logged by everyone who mounts, while by
// some labels snapshotters are handed registry credentials (nydus-snapshotter,
// pkg/label/label.go), and for a sandbox a pod's author can choose any.
var metadataLabels = []string{volume.MetadataManifestDigest, volume.MetadataLayersSize}

// guestMounts turns the mounts of the overlay snapshotter into those of a container
// whose image the guest pulls, and makes directories that went missing again.
func (s *snapshotter) guestMounts(info snapshots.Info, mounts []mount.Mount) ([]mount.Mount, error) {
	d := hostDirs(mounts[0])
	lowest, err := s.users.Directory(chainID(info))
	if err != nil {
		return nil, err
	}
	if d.lower != "" && d.upper != "" && !isLayer(info.Parent) {
		d.lower += ":" + lowest
	}
	if err := restore(d); err != nil {
		return nil, err
	}
	m, err := guestMount(s.mountType, lowest, s.options, info, d)
	if err != nil {
		return nil, err
	}
	return []mount.Mount{m}, nil
}

// guestMount builds the mount that makes a Kata runtime pull the image in the
// guest. It is a pure function.
//
// The directories are in it for the few places where containerd mounts a
// container's root filesystem on the host (to look up users, to copy image
// volumes); the guest does not see them.
func guestMount(mountType, lowest string, options []string, info snapshots.Info, d dirs) (mount.Mount, error) {
	chain := chainID(info)
	metadata := map[string]string{volume.MetadataChainID: chain}
	for _, k := range metadataLabels {
		if v, ok := info.Labels[k]; ok {
			metadata[k] = v
		}
	}
	vol, err := volume.GuestPull(chain, metadata).Option()
	if err != nil {
		return mount.Mount{}, err
	}

	var o []string
	switch {
	case d.upper == "":
		// An overlay without upperdir needs two lowerdirs.
		o = append(o, "lowerdir="+d.lower+":"+lowest)
	case d.lower == "", isLayer(info.Parent):
		// Directories that the older daemon left for layers are empty too.
		// Naming each of them would make the options exceed a page.
		o = append(o, "workdir="+d.work, "upperdir="+d.upper, "lowerdir="+lowest)
	default:
		o = append(o, "workdir="+d.work, "upperdir="+d.upper, "lowerdir="+d.lower)
	}
	o = append(o, options...)
	return mount.Mount{
		Type:    mountType,
		Source:  "overlay",
		Options: append(o, vol),
	}, nil
}

// dirs are a container snapshot's directories. upper and work are empty for a
// view.
type dirs struct{ upper, work, lower string }

// hostDirs finds the directories in the mount that the overlay snapshotter
// gives: a bind of the snapshot's own directory, or of its only parent's, when
// there is nothing to overlay; else an overlay.
func hostDirs(m mount.Mount) (d dirs) {
	if m.Type == "bind" {
		if m.ReadOnly() {
			return dirs{lower: m.Source}
		}
		return dirs{upper: m.Source, work: filepath.Join(filepath.Dir(m.Source), "work")}
	}
	for _, o := range m.Options {
		switch k, v, _ := strings.Cut(o, "="); k {
		case "upperdir":
			d.upper = v
		case "workdir":
			d.work = v
		case "lowerdir":
			d.lower = v
		}
	}
	return d
}

// restore makes the directories of a container's snapshot that went missing.
// Under guest pull they hold nothing of the container, so nothing is lost by it.
func restore(d dirs) error {
	var missing []string
	if d.upper != "" {
		missing = append(missing, d.upper, d.work)
	} else if !strings.Contains(d.lower, ":") {
		missing = append(missing, d.lower)
	}
	for _, dir := range missing {
		if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
			return fmt.Errorf("restore a snapshot's directory: %w", err)
		}
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("restore a snapshot's directory: %w", err)
		}
	}
	return nil
}

// chainID returns the chain ID of the guest-pulled image that a snapshot's
// ancestry ends in, or "". Rows of the older daemon have no label, but a layer
// as their parent.
func chainID(info snapshots.Info) string {
	if isLayer(info.Parent) {
		return info.Parent
	}
	return info.Labels[volume.MetadataChainID]
}

// withChainID returns labels in which the chain ID is what this snapshotter
// says, whatever the caller put there.
func withChainID(labels map[string]string, chain string) map[string]string {
	if labels[volume.MetadataChainID] == chain {
		return labels
	}
	labels = maps.Clone(labels)
	if chain == "" {
		delete(labels, volume.MetadataChainID)
		return labels
	}
	if labels == nil {
		labels = map[string]string{}
	}
	labels[volume.MetadataChainID] = chain
	return labels
}
