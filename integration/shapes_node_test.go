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

package integration_test

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
)

// skipShapes skips a test of made up images where its judge has no say.
func skipShapes(t *testing.T) {
	t.Helper()
	n := harness.New(t, harness.Options{Registry: newRegistry(t)})
	if !hasPatch(n, "0002") {
		t.Skip("this containerd has no patch 0002: an image serves one kind of pods")
	}
	if !n.StandIn() {
		t.Skip("what a guest can run is known of the stand-in; RUNTIME names another")
	}
}

// shapesNode is the node under test, and the one with stock containerd, which is
// started when it is needed.
type shapesNode struct {
	conf     shapeNode
	reg      *registry.Registry
	node     *harness.Node
	pause    *images.Content
	app      string // the image of containers that mount another one
	baseline []string
	shared   []string // layers of the images that stay

	noRunc bool // stock containerd, the judge, starts no pod on the host with this pause image

	stock     *harness.Node
	stockRuns map[string]int // at which attempt a pod on the host runs there, by case; 0 is never
}

var shapeNumber atomic.Int64

func newShapesNode(ctx context.Context, conf shapeNode) (_ *shapesNode, retErr error) {
	n := &shapesNode{conf: conf, stockRuns: map[string]int{}}
	defer func() {
		if retErr != nil {
			n.shutDown()
		}
	}()
	var err error
	if n.reg, err = registry.Start(); err != nil {
		return nil, err
	}
	if n.pause, err = conf.Pause.Build("pause"); err != nil {
		return nil, err
	}
	app, err := images.Shape{}.Build("app")
	if err != nil {
		return nil, err
	}
	if err := errors.Join(n.pause.Put(n.reg, "pause", "1"), app.Put(n.reg, "app", "1")); err != nil {
		return nil, err
	}
	n.app, n.shared = n.reg.Ref("app:1"), slices.Concat(app.Layers, n.pause.Layers)
	if n.node, err = n.start(ctx, ""); err != nil {
		return nil, err
	}
	return n, n.warmUp(ctx)
}

func (n *shapesNode) start(ctx context.Context, binaries string) (*harness.Node, error) {
	o := harness.Options{
		Registry: n.reg, PauseImage: n.reg.Ref("pause:1"), Binaries: binaries,
		LocalPull: n.conf.LocalPull, DiscardUnpackedLayers: n.conf.Discard,
	}
	if binaries == "" && n.conf.DisableLayerFetch {
		o.ExtraConfig = "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.guest]\ndisable_layer_fetch = true\n"
	}
	return harness.Start(ctx, o)
}

// warmUp puts on the node what is there before any case: the pause image and the
// image that mounts others, for both kinds of pods.
func (n *shapesNode) warmUp(ctx context.Context) error {
	handlers := []string{harness.Guest, harness.Runc}
	if n.conf.RuncFirst {
		slices.Reverse(handlers)
	}
	for _, handler := range handlers {
		n.reg.Reset()
		err := func() error {
			pod, err := n.node.RunPod(ctx, harness.PodSpec{Handler: handler})
			if err != nil {
				return err
			}
			if _, err = pod.Run(ctx, harness.ContainerSpec{Image: n.app}); err != nil {
				return err
			}
			return pod.Remove(ctx)
		}()
		if handler == harness.Runc {
			runs, stockErr := n.onStock(ctx, "pause", func(stock *harness.Node) (int, error) {
				pod, err := stock.RunPod(ctx, harness.PodSpec{Handler: harness.Runc})
				if err != nil {
					return 0, nil
				}
				return 1, pod.Remove(ctx)
			})
			if stockErr != nil {
				return stockErr
			}
			if runs == 0 {
				n.noRunc, err = true, nil
			}
		}
		if err != nil {
			return &shapeError{"pause image, handler " + handler, err}
		}
		if handler == harness.Guest {
			pause := imageUse{shapesNode: n, name: "pause", content: n.pause}
			if err := pause.checkFetched(1); err != nil {
				return err
			}
		}
	}
	if err := n.node.GC(ctx); err != nil {
		return err
	}
	var err error
	n.baseline, err = n.inventory(ctx)
	return err
}

// inventory lists what is on the node, without labels: those of content tell which
// images it was fetched for.
func (n *shapesNode) inventory(ctx context.Context) ([]string, error) {
	all, err := n.node.Leftovers(ctx)
	for i, s := range all {
		all[i], _, _ = strings.Cut(s, " map[")
	}
	return all, err
}

// close empties the node and ends everything.
func (n *shapesNode) close(ctx context.Context) error {
	err := n.node.Empty(ctx)
	if err == nil {
		err = n.node.CheckEmpty(ctx)
	}
	if err != nil {
		err = &shapeError{"the node is not empty", err}
	}
	return errors.Join(err, n.shutDown())
}

// shutDown ends everything by force.
func (n *shapesNode) shutDown() error {
	var errs []error
	for _, node := range []*harness.Node{n.node, n.stock} {
		if node != nil {
			errs = append(errs, node.Close())
		}
	}
	if n.reg != nil {
		errs = append(errs, n.reg.Close())
	}
	return errors.Join(errs...)
}

// try tries one case and removes what it has put on the node.
func (n *shapesNode) try(ctx context.Context, c shapeCase) error {
	u, err := n.use(ctx, n.node, c)
	if err != nil {
		return err
	}
	for i, p := range c.Pods {
		if p.Runc && n.noRunc {
			continue
		}
		if err := u.pod(ctx, p); err != nil {
			u.finish(ctx) // so that the node can be used again; what failed is said already
			return fmt.Errorf("pod %d: %w", i+1, err)
		}
	}
	return u.finish(ctx)
}

// imageUse is the use of an image on a node.
type imageUse struct {
	*shapesNode
	on      *harness.Node
	c       shapeCase
	name    string
	ref     string
	content *images.Content
	pods    []*harness.Pod
	// onHost: a pod on the host could run without a pull.
	onHost bool
	// asVolume: a pod on the host had it as a volume, whose pull, or whose mount, may have
	// unpacked what no container's pull does.
	asVolume bool
	// held: a pod on the host has it, and with it its layers, also if the image is removed.
	held bool
	// removed: how the image came to the node no longer counts.
	removed bool
}

// use puts an image into the registry, by a name of its own, and on the node if
// that is how the case begins.
func (n *shapesNode) use(ctx context.Context, on *harness.Node, c shapeCase) (*imageUse, error) {
	u := &imageUse{shapesNode: n, on: on, c: c, name: fmt.Sprintf("shape-%d", shapeNumber.Add(1))}
	u.ref = n.reg.Ref(u.name + ":1")
	var err error
	if u.content, err = c.Image.Build(u.name); err != nil {
		return nil, err
	}
	if err := u.content.Put(n.reg, u.name, "1"); err != nil {
		return nil, err
	}
	n.reg.Reset()
	switch c.Before {
	case "import":
		var archive bytes.Buffer
		if err := u.content.WriteArchive(&archive, u.ref); err != nil {
			return nil, err
		}
		if _, err = on.Client.Import(harness.CRI(ctx), &archive); err == nil {
			err = u.waitForCRI(ctx)
		}
	case "pull":
		_, err = on.Pull(ctx, harness.PullSpec{Image: u.ref})
	case "ctr":
		if on == n.node { // it is for pods that stock containerd has no part in
			_, err = on.Ctr(ctx, "-n", harness.CRINamespace, "images", "pull", "--plain-http", "--snapshotter", harness.Snapshotter, u.ref)
			// ctr takes the manifests of all platforms, and no more of them.
			if e := u.checkFetched(0); e != nil {
				return nil, e
			}
			if err == nil {
				err = u.waitForCRI(ctx)
			}
		}
	}
	// An image that cannot be had so is one that is not there.
	u.onHost = err == nil && (c.Before == "import" || c.Before == "pull")
	return u, nil
}

// waitForCRI waits until CRI has heard of an image that another client made.
func (u *imageUse) waitForCRI(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	for {
		img, err := u.on.ImageStatus(ctx, u.ref)
		if err != nil || img != nil {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// pod runs a pod as the case says, and judges.
func (u *imageUse) pod(ctx context.Context, p shapePod) error {
	if p.Restart {
		if err := errors.Join(u.on.Kill(), u.on.Up(ctx)); err != nil {
			return err
		}
	}
	if p.Remove {
		if err := u.on.RemoveImage(ctx, u.ref); err != nil {
			return err
		}
		u.onHost, u.asVolume, u.removed = false, false, true
	}
	if p.Runc {
		return u.runcPod(ctx, p)
	}
	return u.guestPod(ctx, p)
}

func (u *imageUse) guestPod(ctx context.Context, p shapePod) error {
	u.reg.Reset()
	present, err := u.on.ImageStatus(ctx, u.ref)
	if err != nil {
		return err
	}
	want := refusal(u.c.Image)
	switch {
	case p.Policy == harness.Never && present == nil:
		want = []string{notPresent}
	case p.Volume:
		want = append(want, noVolume)
	}
	errs, err := u.attempts(ctx, p)
	if err != nil {
		return err
	}
	if err := u.checkFetched(1); err != nil {
		return err
	}
	last := errs[len(errs)-1]
	// Only a pull asks for the media type and the size of the config.
	odd := u.c.Image.ConfigSize > 8<<20 || u.c.Image.ConfigType != "" && !isConfigType(u.c.Image.ConfigType)
	switch {
	case odd && present != nil && last == nil:
		return nil
	case want == nil && last != nil:
		return &shapeError{"a pod in a guest never runs", last}
	case want == nil && len(errs) > 1 && !strings.Contains(errs[0].Error(), "has to be pulled for this snapshotter"):
		return &shapeError{"a pod in a guest runs at its second attempt only", errs[0]}
	case want != nil && last == nil:
		return &shapeError{"a pod in a guest runs which should not", fmt.Errorf("no error has any of %q", want)}
	case want != nil && !slices.ContainsFunc(want, func(s string) bool { return strings.Contains(errs[0].Error(), s) }):
		return &shapeError{fmt.Sprintf("an error says none of %q", want), errs[0]}
	case want != nil && !strings.Contains(errs[0].Error(), u.ref):
		return &shapeError{fmt.Sprintf("an error that says one of %q does not name the image", want), errs[0]}
	}
	return nil
}

func (u *imageUse) runcPod(ctx context.Context, p shapePod) error {
	policy := p.Policy
	if policy == harness.Never { // what is present there is not what is here
		policy = harness.IfNotPresent
	}
	c := u.c
	if u.removed {
		c.Before = ""
	}
	stockRuns, err := u.onStock(ctx, fmt.Sprint(c.Image, c.Before, p.Volume, p.Policy == harness.Always), func(stock *harness.Node) (int, error) {
		s, err := u.use(ctx, stock, c)
		if err != nil {
			return 0, err
		}
		errs, err := s.attempts(ctx, shapePod{Runc: true, Volume: p.Volume, Policy: policy})
		if err != nil {
			return 0, err
		}
		if errs[len(errs)-1] != nil {
			return 0, s.remove(ctx)
		}
		return len(errs), s.remove(ctx)
	})
	if err != nil {
		return fmt.Errorf("with stock containerd: %w", err)
	}
	errs, err := u.attempts(ctx, p)
	if err != nil {
		return err
	}
	last, asVolume := errs[len(errs)-1], u.asVolume
	u.asVolume = u.asVolume || p.Volume
	switch {
	case p.Policy == harness.Never && !u.onHost:
		if last == nil && !asVolume && !u.held && !u.isOfImagesThatStay() {
			return &shapeError{"a pod on the host runs without an image", errors.New("pull policy Never")}
		}
		return nil
	case stockRuns > 0 && last != nil:
		return &shapeError{"a pod on the host never runs, on stock containerd it does", last}
	case stockRuns > 0 && len(errs) > stockRuns && !strings.Contains(errs[0].Error(), "has to be pulled for this snapshotter"):
		return &shapeError{"a pod on the host runs later than on stock containerd", errs[0]}
	case u.c.Image.Indexes > 0 && u.c.Image.NoPlatform && stockRuns == 0 && last == nil:
		// Stock containerd cannot tell the size of an image whose index names
		// platforms for others.
	case stockRuns == 0 && last == nil && isForeign(u.c.Image):
		// Stock containerd's client unpacks for any platform, its transfer service for any
		// of one os, and CreateContainer for the host's only; here it unpacks for any, too.
	case stockRuns == 0 && last == nil && !asVolume:
		return &shapeError{"a pod on the host runs, on stock containerd it does not", errors.New("no error")}
	}
	u.onHost, u.held = u.onHost || last == nil, u.held || last == nil
	return nil
}

// isOfImagesThatStay reports whether the host may have all layers because the images
// that stay have them: the lowest one is theirs, unpacked; the same again, on top of
// it, can be unpacked if one of them came in the same encoding.
func (u *imageUse) isOfImagesThatStay() bool {
	return u.c.Image.More == 0 && (!u.c.Image.SameTwice ||
		slices.ContainsFunc(u.content.Layers, func(d string) bool { return slices.Contains(u.shared, d) }))
}

// isForeign reports whether an image's config is for another platform.
func isForeign(i images.Shape) bool {
	return !platforms.Default().Match(platforms.Normalize(ocispec.Platform{
		OS: cmp.Or(i.OS, "linux"), Architecture: cmp.Or(i.Architecture, runtime.GOARCH), Variant: i.Variant, OSFeatures: i.OSFeatures,
	}))
}

// attempts makes kubelet's attempts to start a container in a new pod, three at
// the most, and returns the error of each.
func (u *imageUse) attempts(ctx context.Context, p shapePod) ([]error, error) {
	s := harness.PodSpec{Handler: harness.Guest}
	if p.Runc {
		s.Handler = harness.Runc
	}
	pod, err := u.on.RunPod(ctx, s)
	if err != nil {
		return nil, &shapeError{"a sandbox does not start", err}
	}
	u.pods = append(u.pods, pod)
	if p.KubeletRestarted {
		pod.Config.Annotations[firstSeen] = time.Now().Format(time.RFC3339Nano)
	}
	var errs []error
	for range 3 {
		errs = append(errs, u.attempt(ctx, pod, p))
		if errs[len(errs)-1] == nil {
			break
		}
	}
	return errs, nil
}

func (u *imageUse) attempt(ctx context.Context, pod *harness.Pod, p shapePod) error {
	spec, name := harness.ContainerSpec{Image: u.ref, PullPolicy: p.Policy}, u.name
	if p.Volume {
		image, err := pod.EnsureImage(ctx, u.ref, p.Policy, nil)
		if err != nil {
			return err
		}
		name = "app"
		spec = harness.ContainerSpec{Image: u.app, Mounts: []*runtimeapi.Mount{{
			ContainerPath: "/volume", Readonly: true,
			Image: &runtimeapi.ImageSpec{Image: image, UserSpecifiedImage: u.ref},
		}}}
	}
	c, err := pod.Run(ctx, spec)
	if err != nil {
		return err
	}
	_, err = c.WaitLogs(ctx, u.c.Image.Greeting(name)+"1000\n")
	return err
}

// checkFetched asks the registry whether the host has fetched what it need not, or
// more manifests of one platform than so many; 0 is for any manifests.
func (u *imageUse) checkFetched(manifests int) error {
	host := u.reg.Log().By(registry.Host)
	more := host.Where(func(r registry.Request) bool {
		return !slices.Contains([]registry.Kind{registry.Ping, registry.Manifest, registry.Config}, r.Kind)
	})
	if len(more) > 0 {
		return &shapeError{"the host fetched more than manifests and configs", errors.New(more.String())}
	}
	if manifests == 0 {
		return nil
	}
	fetched := host.In(u.name).OK()
	more = fetched.Where(func(r registry.Request) bool { return r.Reference != "1" && !u.content.Needed[r.Reference] })
	if len(more) > 0 {
		return &shapeError{"the host fetched another image's manifest or config", errors.New(more.String())}
	}
	chosen := 0
	for _, r := range fetched.References() {
		if slices.ContainsFunc(u.content.Images, func(d ocispec.Descriptor) bool { return d.Digest.String() == r && d.Platform != nil }) {
			chosen++
		}
	}
	if chosen > manifests {
		return &shapeError{"the host fetched several manifests of one platform", errors.New(fetched.String())}
	}
	return nil
}

// remove removes the pods and the image as kubelet does.
func (u *imageUse) remove(ctx context.Context) error {
	var errs []error
	for _, p := range u.pods {
		errs = append(errs, p.Remove(ctx))
	}
	errs = append(errs, u.on.RemoveImage(ctx, u.ref))
	// Of what CRI cannot make an image of it knows nothing. Who imported it, or pulled
	// it with ctr, has to remove it.
	if u.c.Before != "" {
		store := u.on.Client.ImageService()
		names := []string{u.ref, u.content.Config.Digest.String(), u.reg.Ref(u.name + "@" + u.content.Root.Digest.String())}
		for _, name := range names {
			if err := store.Delete(harness.CRI(ctx), name); !errdefs.IsNotFound(err) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(append(errs, u.on.GC(ctx))...)
}

// finish removes all, and looks what is left.
func (u *imageUse) finish(ctx context.Context) error {
	if err := u.remove(ctx); err != nil {
		return &shapeError{"removing pods and image", err}
	}
	var more []string
	for began := time.Now(); time.Since(began) < 10*time.Second; time.Sleep(20 * time.Millisecond) {
		now, err := u.inventory(ctx)
		if err != nil {
			return err
		}
		more = slices.DeleteFunc(now, func(s string) bool {
			return slices.Contains(u.baseline, s) ||
				// It may have come for the image, and is one of another that stays.
				slices.ContainsFunc(u.shared, func(d string) bool { return strings.Contains(s, strings.TrimPrefix(d, "sha256:")) })
		})
		if len(more) == 0 {
			return nil
		}
	}
	u.baseline = append(u.baseline, more...) // said once
	return &shapeError{"left over on the node", errors.New(strings.Join(more, "\n"))}
}

// onStock tells at which attempt something that pods on the host do succeeds on a
// node with stock containerd, or 0. It is done once for each key.
func (n *shapesNode) onStock(ctx context.Context, key string, do func(stock *harness.Node) (int, error)) (int, error) {
	if runs, ok := n.stockRuns[key]; ok {
		return runs, nil
	}
	if n.stock == nil {
		dir, err := unpatchedBinaries()
		if err != nil {
			return 0, err
		}
		if n.stock, err = n.start(ctx, dir); err != nil {
			return 0, fmt.Errorf("start stock containerd: %w", err)
		}
	}
	runs, err := do(n.stock)
	n.stockRuns[key] = runs
	return runs, err
}
