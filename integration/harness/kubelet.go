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

package harness

import (
	"context"
	"fmt"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// PullPolicy is a container's imagePullPolicy.
type PullPolicy string

// The policies; "" means IfNotPresent.
const (
	IfNotPresent PullPolicy = "IfNotPresent"
	Always       PullPolicy = "Always"
	Never        PullPolicy = "Never"
)

// EnsureImage makes the calls by which kubelet gets a container's image
// (kubernetes pkg/kubelet/images, EnsureImageExists): the presence check, which
// carries the pod's annotations, and a pull if that finds nothing or if the
// policy is Always. It returns the reference to create the container with.
func (p *Pod) EnsureImage(ctx context.Context, image string, policy PullPolicy, auth *runtimeapi.AuthConfig) (string, error) {
	if policy != Always {
		spec := &runtimeapi.ImageSpec{Image: image, Annotations: p.Config.Annotations}
		if p.node.opts.PullHint == HintImageSpec {
			spec.RuntimeHandler = p.Handler
		}
		r, err := p.node.Images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: spec})
		if err != nil {
			return "", fmt.Errorf("ImageStatus %s: %w", image, err)
		}
		if r.GetImage() != nil {
			return r.GetImage().GetId(), nil
		}
		if policy == Never {
			return "", fmt.Errorf("image %s is not present with pull policy Never", image)
		}
	}
	return p.pull(ctx, image, auth)
}

type imageUser struct {
	uid  *int64
	name string
}

// imageUser is kubelet's getImageUser (kubernetes pkg/kubelet/kuberuntime): it
// asks with neither annotations nor a handler, and takes an image that it does
// not find for one that runs as root.
func (n *Node) imageUser(ctx context.Context, image string) (imageUser, error) {
	img, err := n.ImageStatus(ctx, image)
	switch {
	case err != nil:
		return imageUser{}, err
	case img != nil && img.Uid != nil:
		return imageUser{uid: &img.Uid.Value}, nil
	case img != nil && img.Username != "":
		return imageUser{name: img.Username}, nil
	}
	return imageUser{uid: new(int64)}, nil
}

// Create makes kubelet's calls up to CreateContainer: it gets the image, asks
// for its user, and creates the container.
func (p *Pod) Create(ctx context.Context, s ContainerSpec) (*Container, error) {
	ref, err := p.EnsureImage(ctx, s.Image, s.PullPolicy, s.Auth)
	if err != nil {
		return nil, err
	}
	user, err := p.node.imageUser(ctx, s.Image)
	if err != nil {
		return nil, err
	}
	return p.CreateFrom(ctx, p.containerConfig(s, ref, user))
}

// Run makes kubelet's calls to get a container running.
func (p *Pod) Run(ctx context.Context, s ContainerSpec) (*Container, error) {
	c, err := p.Create(ctx, s)
	if err != nil {
		return nil, err
	}
	return c, c.Start(ctx)
}
