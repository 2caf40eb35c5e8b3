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

// Package status tells what of the guest-pull snapshotter is on a node: which
// images were left to guests, how much that keeps off the host, and the snapshots
// of containers. It asks a running containerd and changes nothing.
package status

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
)

// Snapshotter is the name of the snapshotter.
const Snapshotter = "guest-pull"

// Status is the state of a node.
type Status struct {
	// Root is the snapshotter's directory, and Directories the number of
	// snapshots' directories in it: -1 when it cannot be read from here.
	Root        string `json:"root"`
	Directories int    `json:"directories"`
	// Images are the images that the snapshotter has, in all namespaces.
	Images []Image `json:"images"`
	// OtherImages is the number of images that it does not have.
	OtherImages int `json:"other_images"`
	// LayersOffHost and BytesOffHost are what the images' layers have that are
	// nowhere on the host, each layer counted once. Bytes are compressed, as
	// in the manifests.
	LayersOffHost int   `json:"layers_off_host"`
	BytesOffHost  int64 `json:"bytes_off_host"`
	// Snapshots are the snapshots of containers.
	Snapshots []Snapshot `json:"container_snapshots"`
	// UnresolvedUsers are the containers whose user was guessed.
	UnresolvedUsers []UnresolvedUser `json:"unresolved_users"`
}

// UnresolvedUser is a container for whose user the pod does not say all, and the host
// does not have it in the image.
type UnresolvedUser struct {
	Namespace string `json:"namespace"`
	Container string `json:"container"`
	// Pod and Name are the pod's namespace and name, and the container's name in it.
	Pod  string `json:"pod"`
	Name string `json:"name"`
	// Guess is what containerd took for it.
	Guess string `json:"guess"`
}

// labelUnresolvedUser is the label of such a container
// (internal/cri/labels/labels.go, after patches/containerd).
const labelUnresolvedUser = "io.cri-containerd.unresolved-user"

// Image is an image that the snapshotter has.
type Image struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	Digest    string `json:"digest"`
	// GuestOnly says that only a guest can run it: no other snapshotter has
	// it, and at least one of its layers is nowhere on the host.
	GuestOnly bool `json:"guest_only"`
	// Layers is the number of its layers, and Bytes what a guest fetches of
	// them. LayersOffHost of them, of BytesOffHost bytes, are neither in the
	// content store nor in another snapshotter.
	Layers        int   `json:"layers"`
	Bytes         int64 `json:"bytes"`
	LayersOffHost int   `json:"layers_off_host"`
	BytesOffHost  int64 `json:"bytes_off_host"`
	// Snapshotters are the others that have it.
	Snapshotters []string `json:"other_snapshotters"`
}

// Snapshot is a snapshot of a container.
type Snapshot struct {
	Namespace string `json:"namespace"`
	Key       string `json:"key"`
	Kind      string `json:"kind"`
	// Container is the container that has it, or "".
	Container string `json:"container"`
	// Orphan says that no container, no other snapshot and no lease needs it.
	Orphan bool `json:"orphan"`
}

// Orphans returns the snapshots that nothing needs.
func (s Status) Orphans() []Snapshot {
	return slices.DeleteFunc(slices.Clone(s.Snapshots), func(s Snapshot) bool { return !s.Orphan })
}

// Collect asks a containerd. It fails with errdefs.ErrNotFound when that one does
// not have the snapshotter.
func Collect(ctx context.Context, c *containerd.Client) (Status, error) {
	s := Status{Directories: -1, Images: []Image{}, Snapshots: []Snapshot{}, UnresolvedUsers: []UnresolvedUser{}}
	others, err := s.plugins(ctx, c)
	if err != nil {
		return s, err
	}
	all, err := c.NamespaceService().List(ctx)
	if err != nil {
		return s, fmt.Errorf("list namespaces: %w", err)
	}
	// The content store and the snapshotters keep one copy for all namespaces.
	n := node{client: c, content: map[digest.Digest]bool{}, unpacked: map[string]map[string]bool{}, offHost: map[digest.Digest]int64{}}
	for _, ns := range all {
		if err := n.look(namespaces.WithNamespace(ctx, ns), others); err != nil {
			return s, fmt.Errorf("namespace %s: %w", ns, err)
		}
	}
	for _, ns := range all {
		if err := s.namespace(namespaces.WithNamespace(ctx, ns), ns, &n, others); err != nil {
			return s, fmt.Errorf("namespace %s: %w", ns, err)
		}
	}
	s.LayersOffHost = len(n.offHost)
	for _, size := range n.offHost {
		s.BytesOffHost += size
	}
	return s, nil
}

// plugins finds the snapshotter's root, and the other snapshotters.
func (s *Status) plugins(ctx context.Context, c *containerd.Client) (others []string, err error) {
	r, err := c.IntrospectionService().Plugins(ctx, "type=="+string(plugins.SnapshotPlugin))
	if err != nil {
		return nil, fmt.Errorf("ask containerd for its snapshotters: %w", err)
	}
	found := false
	for _, p := range r.GetPlugins() {
		switch {
		case p.ID == Snapshotter && p.InitErr != nil:
			return nil, fmt.Errorf("the snapshotter %s did not start: %s: %w", Snapshotter, p.InitErr.Message, errdefs.ErrUnavailable)
		case p.ID == Snapshotter:
			found = true
			s.Root = p.Exports["root"]
		case p.InitErr == nil:
			others = append(others, p.ID)
		}
	}
	if !found {
		return nil, fmt.Errorf("this containerd has no snapshotter %s: %w", Snapshotter, errdefs.ErrNotFound)
	}
	if entries, err := os.ReadDir(filepath.Join(s.Root, "snapshots")); err == nil {
		s.Directories = len(entries)
	}
	return others, nil
}

// maxSize is the size in bytes up to which a manifest is believed what it says of a
// layer. Sums of it do not overflow.
const maxSize = 1 << 40

// node is what namespaces share.
type node struct {
	client   *containerd.Client
	content  map[digest.Digest]bool
	unpacked map[string]map[string]bool // by snapshotter: names of snapshots
	offHost  map[digest.Digest]int64
}

func (n *node) look(ctx context.Context, others []string) error {
	if err := n.client.ContentStore().Walk(ctx, func(i content.Info) error {
		n.content[i.Digest] = true
		return nil
	}); err != nil {
		return fmt.Errorf("list content: %w", err)
	}
	for _, o := range others {
		if n.unpacked[o] == nil {
			n.unpacked[o] = map[string]bool{}
		}
		if err := n.client.SnapshotService(o).Walk(ctx, func(_ context.Context, i snapshots.Info) error {
			n.unpacked[o][i.Name] = true
			return nil
		}); err != nil {
			return fmt.Errorf("list snapshots of %s: %w", o, err)
		}
	}
	return nil
}

func (s *Status) namespace(ctx context.Context, ns string, n *node, others []string) error {
	mine := map[string]snapshots.Info{}
	if err := n.client.SnapshotService(Snapshotter).Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		mine[i.Name] = i
		return nil
	}); err != nil {
		return fmt.Errorf("list snapshots of %s: %w", Snapshotter, err)
	}
	all, err := n.client.ImageService().List(ctx)
	if err != nil {
		return fmt.Errorf("list images: %w", err)
	}
	slices.SortFunc(all, func(a, b images.Image) int { return cmp.Compare(a.Name, b.Name) })
	for _, i := range all {
		image, ok, err := n.image(ctx, i, mine, others)
		switch {
		case err != nil:
			return fmt.Errorf("image %s: %w", i.Name, err)
		case !ok:
			s.OtherImages++
		default:
			image.Namespace = ns
			s.Images = append(s.Images, image)
		}
	}
	return s.snapshots(ctx, ns, n, mine)
}

// image describes an image, and is false when the snapshotter does not have it.
func (n *node) image(ctx context.Context, i images.Image, mine map[string]snapshots.Info, others []string) (Image, bool, error) {
	cs := n.client.ContentStore()
	manifest, err := images.Manifest(ctx, cs, i.Target, platforms.Default())
	if err != nil {
		if errdefs.IsNotFound(err) { // of another platform, or incomplete
			return Image{}, false, nil
		}
		return Image{}, false, err
	}
	diffIDs, err := images.RootFS(ctx, cs, manifest.Config)
	if errdefs.IsNotFound(err) || (err == nil && (len(diffIDs) == 0 || len(diffIDs) != len(manifest.Layers))) {
		return Image{}, false, nil // incomplete, or an artifact
	}
	if err != nil {
		return Image{}, false, err
	}
	chain := identity.ChainIDs(diffIDs)
	top := chain[len(chain)-1].String()
	if _, ok := mine[top]; !ok {
		return Image{}, false, nil
	}
	img := Image{Name: i.Name, Digest: i.Target.Digest.String(), Layers: len(chain), Snapshotters: []string{}}
	for _, o := range others {
		if n.unpacked[o][top] {
			img.Snapshotters = append(img.Snapshotters, o)
		}
	}
	for k, id := range chain {
		layer := manifest.Layers[k]
		img.Bytes += layer.Size
		unpacked := slices.ContainsFunc(others, func(o string) bool { return n.unpacked[o][id.String()] })
		if unpacked || n.content[layer.Digest] {
			continue
		}
		size := min(max(layer.Size, 0), maxSize) // is what the image's author says
		img.LayersOffHost++
		img.BytesOffHost += size
		n.offHost[layer.Digest] = size
	}
	img.GuestOnly = len(img.Snapshotters) == 0 && img.LayersOffHost > 0
	return img, true, nil
}

// snapshots lists the snapshots of containers: all that are not named by a chain
// ID, as layers are.
func (s *Status) snapshots(ctx context.Context, ns string, n *node, mine map[string]snapshots.Info) error {
	containers, err := n.client.ContainerService().List(ctx)
	if err != nil {
		return fmt.Errorf("list containers: %w", err)
	}
	owner := map[string]string{}
	for _, c := range containers {
		if c.Snapshotter == Snapshotter {
			owner[c.SnapshotKey] = c.ID
			if guess := c.Labels[labelUnresolvedUser]; guess != "" {
				s.UnresolvedUsers = append(s.UnresolvedUsers, UnresolvedUser{
					Namespace: ns, Container: c.ID, Guess: guess, Name: c.Labels["io.kubernetes.container.name"],
					Pod: c.Labels["io.kubernetes.pod.namespace"] + "/" + c.Labels["io.kubernetes.pod.name"],
				})
			}
		}
	}
	needed := map[string]bool{}
	for _, i := range mine {
		needed[i.Parent] = true
	}
	ls := n.client.LeasesService()
	all, err := ls.List(ctx)
	if err != nil {
		return fmt.Errorf("list leases: %w", err)
	}
	for _, l := range all {
		resources, err := ls.ListResources(ctx, leases.Lease{ID: l.ID})
		if err != nil && !errdefs.IsNotFound(err) { // it may just have ended
			return fmt.Errorf("list the resources of lease %s: %w", l.ID, err)
		}
		for _, r := range resources {
			if r.Type == "snapshots/"+Snapshotter {
				needed[r.ID] = true
			}
		}
	}
	for _, key := range slices.Sorted(maps.Keys(mine)) {
		if digest.Digest(key).Validate() == nil {
			continue
		}
		s.Snapshots = append(s.Snapshots, Snapshot{
			Namespace: ns,
			Key:       key,
			Kind:      strings.ToLower(mine[key].Kind.String()),
			Container: owner[key],
			Orphan:    owner[key] == "" && !needed[key],
		})
	}
	return nil
}

// WriteJSON writes the status as one JSON object.
func (s Status) WriteJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(s)
}

// WriteTable writes the status for a person.
func (s Status) WriteTable(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	if len(s.Images) > 0 {
		fmt.Fprintln(t, "NAMESPACE\tIMAGE\tGUEST ONLY\tLAYERS\tOFF THE HOST\tBYTES OFF THE HOST\tALSO IN")
	}
	only := 0
	for _, i := range s.Images {
		guestOnly := "no"
		if i.GuestOnly {
			guestOnly = "yes"
			only++
		}
		also := strings.Join(i.Snapshotters, ",")
		if also == "" {
			also = "-"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%d\t%d\t%s\n", i.Namespace, i.Name, guestOnly, i.Layers, i.LayersOffHost, i.BytesOffHost, also)
	}
	if len(s.Images) > 0 {
		fmt.Fprintln(t)
	}
	orphans := s.Orphans()
	directories := "unknown"
	if s.Directories >= 0 {
		directories = fmt.Sprint(s.Directories)
	}
	for _, row := range [][2]string{
		{"images of the snapshotter", fmt.Sprintf("%d, %d of them guest only", len(s.Images), only)},
		{"other images", fmt.Sprint(s.OtherImages)},
		{"layers kept off the host", fmt.Sprint(s.LayersOffHost)},
		{"bytes kept off the host", fmt.Sprintf("%d (compressed)", s.BytesOffHost)},
		{"container snapshots", fmt.Sprint(len(s.Snapshots))},
		{"orphaned snapshots", fmt.Sprint(len(orphans))},
		{"containers with a guessed user", fmt.Sprint(len(s.UnresolvedUsers))},
		{"directories in " + s.Root, directories},
	} {
		fmt.Fprintf(t, "%s:\t%s\n", row[0], row[1])
	}
	for _, o := range orphans {
		fmt.Fprintf(t, "orphan:\t%s snapshot %s in namespace %s (ctr -n %s snapshots --snapshotter %s rm %s)\n", o.Kind, o.Key, o.Namespace, o.Namespace, Snapshotter, o.Key)
	}
	for _, u := range s.UnresolvedUsers {
		fmt.Fprintf(t, "guessed:\t%s for container %s of pod %s (%s in namespace %s)\n", u.Guess, u.Name, u.Pod, u.Container, u.Namespace)
	}
	return t.Flush()
}
