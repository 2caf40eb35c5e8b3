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

package main

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
)

// containerImage has as many layers as a large image has.
const containerImage = 20

// containers measures containers' creation and removal over CRI, in a sandbox
// that is up, of an image that is there. CreateContainer ends before any runtime
// comes into play, so the snapshotter is all that differs.
func (b *bench) containers(ctx context.Context) (err error) {
	b.begin("Containers over CRI")
	img, err := b.push(containerImage)
	if err != nil {
		return err
	}
	host, err := b.pushHost(containerImage)
	if err != nil {
		return err
	}
	unpatched, err := harness.Start(ctx, harness.Options{Registry: b.reg, Binaries: b.binaries.unpatched, ExtraConfig: quiet})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unpatched.Close()) }()

	const stock = "guest-pull in unpatched containerd"
	var creators []*creator
	var usages []usage
	for _, c := range []struct {
		name, handler string
		node          *harness.Node
		image         remoteImage
	}{{guestPull, harness.Guest, b.node, img}, {overlayfs, harness.Runc, b.node, host}, {stock, harness.Guest, unpatched, img}} {
		var made *creator
		use, err := b.added(ctx, func() error {
			_, err := c.node.Pull(ctx, harness.PullSpec{Image: c.image.ref, Handler: c.handler, Hint: harness.HintImageSpec})
			return err
		})
		if err != nil {
			return err
		}
		if c.node == b.node {
			usages = append(usages, use)
		}
		if made, err = newCreator(ctx, c.name, c.node, c.handler); err != nil {
			return err
		}
		if err := made.prepare(ctx, c.image.ref); err != nil {
			return err
		}
		creators = append(creators, made)
	}
	b.compareUsage(fmt.Sprintf("an image of %d layers", containerImage), usages[0], usages[1], nil)
	var create, remove []contender
	for _, c := range creators {
		create = append(create, contender{c.name, func() (float64, error) { return c.create(ctx) }})
		remove = append(remove, contender{c.name, func() (float64, error) { return c.remove(ctx) }})
	}
	created, err := interleave(ctx, b.scale.containerRounds, create...)
	if err != nil {
		return err
	}
	b.compare("create a container", "overlayfs", "s", created[guestPull], created[overlayfs], atMost(0.75))
	b.compare("create a container", stock, "s", created[guestPull], created[stock], nil)
	b.compareSubject(stock, "create a container", "overlayfs", "s", created[stock], created[overlayfs], nil)

	removed, err := interleave(ctx, b.scale.containerRounds, remove...)
	if err != nil {
		return err
	}
	b.compare("remove a container", "overlayfs", "s", removed[guestPull], removed[overlayfs], nil)

	var perContainer []usage
	for _, c := range creators[:2] {
		use, err := b.added(ctx, func() error {
			_, err := c.create(ctx)
			return err
		})
		if err != nil {
			return err
		}
		perContainer = append(perContainer, use)
	}
	b.compareUsage("a container", perContainer[0], perContainer[1], nil)

	for _, c := range creators[:2] {
		if err := c.pod.Remove(ctx); err != nil {
			return err
		}
	}
	return errors.Join(b.forget(ctx, img), b.forget(ctx, host))
}

// creator creates containers in a pod.
type creator struct {
	name    string
	pod     *harness.Pod
	first   *harness.Container
	created []*harness.Container
}

func newCreator(ctx context.Context, name string, n *harness.Node, handler string) (*creator, error) {
	pod, err := n.RunPod(ctx, harness.PodSpec{Handler: handler})
	return &creator{name: name, pod: pod}, err
}

// prepare creates one container as kubelet does, whose configuration the others
// have too.
func (c *creator) prepare(ctx context.Context, image string) (err error) {
	c.first, err = c.pod.Create(ctx, harness.ContainerSpec{Image: image})
	return err
}

// create measures CreateContainer.
func (c *creator) create(ctx context.Context) (float64, error) {
	config := proto.CloneOf(c.first.Config)
	config.Metadata.Name = fmt.Sprintf("%s-%d", config.Metadata.Name, len(c.created))
	config.Metadata.Attempt = uint32(len(c.created))
	return timed(func() error {
		made, err := c.pod.CreateFrom(ctx, config)
		c.created = append(c.created, made)
		return err
	})
}

// remove measures RemoveContainer, of one that create has made.
func (c *creator) remove(ctx context.Context) (float64, error) {
	last := c.created[len(c.created)-1]
	c.created = c.created[:len(c.created)-1]
	return timed(func() error { return last.Remove(ctx) })
}
